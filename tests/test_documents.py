"""What the documents say is what the code does: commands, targets, files, keys, columns, links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), flags=re.MULTILINE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_make_target_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|[`;]| {4})(?:RLHF_DEVICE=\w+ )?make ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert named <= make_targets()


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [t for t in targets if "://" not in t and not (path.parent / t).exists()] == []


def test_files_that_the_documents_name_exist():
    pattern = re.compile(r"`((?:rlhf|actors|cluster|configs|tests|docs|benchmarks)/[\w./-]+)`")
    named = {match for path in DOCUMENTS for match in pattern.findall(path.read_text(encoding="utf-8"))}
    assert sorted(name for name in named if "NAME" not in name and not (ROOT / name).exists()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_command_that_is_named_is_understood(path):
    from cluster.cli import build_parser

    parser = build_parser()
    commands = re.findall(r"`rlhf ([^`]+)`", path.read_text(encoding="utf-8"))
    for command in commands:
        words = re.sub(r"\[[^\]]*\]|\.\.\.", "", command).split()
        if len(words) > 1 or words == ["doctor"]:  # a bare name such as `rlhf run` is prose
            assert parser.parse_args(words).command == words[0], command


def test_the_readme_lists_every_command():
    from cluster.cli import build_parser

    [commands] = [action.choices for action in build_parser()._actions if action.choices]
    assert set(re.findall(r"^\| `rlhf ([a-z-]+)", text_of("README.md"), flags=re.MULTILINE)) == set(commands)


def test_the_readme_describes_the_stages_of_the_quickstart():
    from rlhf.config import load_file

    stages = [stage["kind"] for stage in load_file(ROOT / "configs" / "quickstart.yaml")["stages"]]
    listed = re.findall(r"^\| `([a-z]+)` \|.*\|.*\|$", text_of("README.md"), flags=re.MULTILINE)
    assert listed == stages


def test_the_readme_recipe_fragments_are_valid():
    from cluster.config import RunConfig
    from rlhf.config import load_file, merge, parse_yaml, validate

    fragments = re.findall(r"```yaml\n(.*?)```", text_of("README.md"), flags=re.DOTALL)
    assert len(fragments) >= 2
    base = load_file(ROOT / "configs" / "quickstart.yaml")
    for fragment in fragments:
        document = parse_yaml(fragment, "README.md")
        config = validate(RunConfig, merge(base, document), "README.md")
        assert document.keys() <= config.model_fields_set


def test_the_exit_codes_are_those_of_the_errors():
    from rlhf import errors

    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    listed = re.findall(r"^\| ([\d, ]+) \|", text_of("README.md"), flags=re.MULTILINE)
    assert codes | {0, 130, 143} == {int(code) for row in listed for code in row.split(",")}


def test_the_run_directory_document_follows_the_code():
    from rlhf.runs import tables
    from rlhf.runs.changes import RESUMABLE_KEYS

    text = text_of("docs/run_directory.md")
    for name, schema in {"rollouts": tables.ROLLOUTS, "verdicts": tables.VERDICTS, "rankings": tables.RANKINGS}.items():
        row = re.search(rf"^\| {name} \| \w+ \| (.*) \|$", text, flags=re.MULTILINE)
        assert row is not None
        assert re.sub(r"\([^)]*\)", "", row[1]).replace(" ", "").split(",") == schema.names
    block = text.split("it is judged:")[1].split("Anything else")[0]
    assert set(block.split()) == set(RESUMABLE_KEYS)


def test_no_line_is_too_long_for_a_terminal():
    long = [
        f"{path.name}:{number}"
        for path in DOCUMENTS
        if path.name != "config.md"  # tables
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    ]
    assert long == []


def test_help_lists_the_targets():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert all(f"make {target}" in done.stdout for target in ("setup", "quickstart", "test", "test-all", "seeds"))
