"""One driver at a time; a run resumes under its own config and data only."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.config import StrictModel, load_file, validate
from rlhf.errors import ConfigError, DataError, RecordError
from rlhf.runs.changes import RESUMABLE_KEYS, config_changes, matches_any
from rlhf.runs.directory import RunDirectory
from rlhf.runs.environment import fingerprint, git_revision, package_versions
from rlhf.runs.events import read_events


class Stage(StrictModel):
    name: str = "rl"
    steps: int = 10
    learning_rate: float = 1e-5


class Config(StrictModel):
    seed: int = 0
    stages: tuple[Stage, ...] = (Stage(), Stage(name="sft"))
    gate: str = "open"
    api_key: str = ""
    timeout_s: float = 5.0


def opened(root: Path, config: Config | None = None, **kwargs) -> RunDirectory:
    return RunDirectory.open(root, config or Config(), **kwargs)


def test_creates_what_a_reader_needs(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("{}\n")
    with opened(tmp_path / "run", data={"prompts": data}) as run:
        assert validate(Config, load_file(run.config), "config") == Config()
        environment = json.loads(run.environment.read_text())
        assert environment["data"]["prompts"]["bytes"] == 3
        assert environment["packages"]["torch"] == package_versions()["torch"]
        assert [event["kind"] for event in read_events(run.events.path)] == ["created"]


def test_resumes_with_the_same_config(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    with opened(tmp_path / "run") as run:
        kinds = [event["kind"] for event in read_events(run.events.path)]
    assert kinds == ["created", "resumed"]


def test_a_new_run_can_be_withdrawn_and_no_other(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.withdraw()
    assert not run.root.exists()
    run.root.mkdir()
    with opened(tmp_path / "run") as run:
        run.withdraw()
    assert run.root.is_dir(), "it was there before"
    opened(tmp_path / "run", Config(seed=1)).close()
    before = {path.name for path in run.root.iterdir()}
    with opened(tmp_path / "run", Config(seed=1)) as run:
        run.withdraw()
    assert {path.name for path in run.root.iterdir()} == before


def test_listed_keys_may_change_and_are_recorded(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    changed = Config(stages=(Stage(steps=99), Stage(name="sft")), gate="exclusive", timeout_s=9.0)
    with opened(tmp_path / "run", changed) as run:
        assert validate(Config, load_file(run.config), "config") == changed
        event = read_events(run.events.path)[-1]
    assert event["config_changes"]["stages.0.steps"] == [10, 99]
    assert set(event["config_changes"]) == {"stages.0.steps", "gate", "timeout_s"}


def test_a_complete_stage_keeps_its_settings(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.complete("rl", {})
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "run", Config(stages=(Stage(steps=20), Stage(name="sft", steps=20))))
    assert "stage rl, which is complete" in caught.value.found
    assert "stages.0.steps: 10 -> 20" in caught.value.found and "stages.1" not in caught.value.found
    assert caught.value.exit_code == 2
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    opened(tmp_path / "run", Config(stages=(Stage(), Stage(name="sft", steps=20)))).close()  # that one is still open


@pytest.mark.parametrize("key", ["stages.0.max_missing_fraction", "stages.4.loop.max_missing_fraction"])
def test_what_an_error_advises_to_change_may_change(key: str) -> None:
    assert matches_any(key, RESUMABLE_KEYS)


@pytest.mark.parametrize(
    ("key", "may"),
    [
        ("roles.learner.ranks", True),
        ("stages.2.learner.deepspeed.zero_stage", True),
        ("stages.2.critic.deepspeed.offload_optimizer", True),
        ("checkpoints.in_background", True),
        ("checkpoints.target", False),
        ("stages.2.learner.optim.lr", False),
    ],
)
def test_how_the_state_is_spread_and_written_may_change_and_where_it_is_may_not(key: str, may: bool) -> None:
    assert matches_any(key, RESUMABLE_KEYS) is may


@pytest.mark.parametrize("key", ["logging.level", "placement.learner"])
def test_keys_that_no_recipe_has_are_not_listed_as_changeable(key: str) -> None:
    assert not matches_any(key, RESUMABLE_KEYS)


def test_other_keys_are_refused_with_a_diff_and_nothing_changes(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    before = (tmp_path / "run" / "config.yaml").read_text()
    changed = Config(seed=1, stages=(Stage(steps=5, learning_rate=2e-5), Stage(name="sft")))
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "run", changed)
    assert "seed: 0 -> 1" in str(caught.value)
    assert "stages.0.learning_rate: 1e-05 -> 2e-05" in str(caught.value)
    assert "stages.0.steps" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    opened(tmp_path / "run").close()  # the refusal gave the lock back


def test_a_stage_more_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    with pytest.raises(ConfigError, match="stages:"):
        opened(tmp_path / "run", Config(stages=(Stage(),)))


def test_own_list_of_resumable_keys(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    reopened = opened(tmp_path / "run", Config(seed=3), resumable=["seed"])
    assert reopened.resolved_config()["seed"] == 3
    reopened.close()


def test_changed_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("{}\n")
    opened(tmp_path / "run", data={"prompts": data}).close()
    data.write_text("[]\n")
    with pytest.raises(ConfigError, match="data.prompts:"):
        opened(tmp_path / "run", data={"prompts": data})


def test_data_that_are_read_no_more_may_be_gone(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("{}\n")
    opened(tmp_path / "run", data={"prompts": data}).close()
    data.unlink()
    with opened(tmp_path / "run", data=None) as run:
        kept = json.loads(run.environment.read_text())["data"]
    assert kept["prompts"]["bytes"] == 3, "the record stays what it was"


def test_missing_data_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        opened(tmp_path / "run", data={"prompts": tmp_path / "absent"})


def test_fingerprint_of_a_folder_depends_on_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    first = fingerprint(tmp_path)["blake2b"]
    (tmp_path / "b").rename(tmp_path / "c")
    assert fingerprint(tmp_path)["blake2b"] != first


def test_secrets_do_not_reach_the_files(tmp_path: Path) -> None:
    config = Config(api_key="sk-abcdefghijklmnopqrstuvwx")
    with opened(tmp_path / "run", config) as run:
        text = "".join(p.read_text() for p in run.root.rglob("*") if p.is_file())
        assert "abcdefghij" not in text
    opened(tmp_path / "run", config).close()  # hidden on both sides, so still the same config


def test_a_strange_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="thesis.tex"):
        opened(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="a file"):
        opened(tmp_path / "file")


def test_second_driver_is_refused_and_a_killed_one_is_not(tmp_path: Path) -> None:
    root = tmp_path / "run"
    opened(root).close()
    code = (
        "import sys, time; from pathlib import Path\n"
        "from tests.rlhf.runs.test_directory import opened\n"
        "run = opened(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(ConfigError, match=f'another driver at work .*"pid": {holder.pid}') as caught:
            opened(root)
        assert "another run_dir" in caught.value.action
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
        holder.stdout.close()
    opened(root).close()


def test_lock_is_not_inherited_by_programs_that_the_driver_starts(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    code = "import time; print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], close_fds=False, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "up\n"
        run.close()
        opened(tmp_path / "run").close()
    finally:
        child.kill()
        child.wait(timeout=30)
        child.stdout.close()


def test_stages_are_complete_once_written(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        assert not run.is_complete("feedback")
        with pytest.raises(RecordError):
            run.results("feedback")
        run.complete("feedback", {"rankings": 12})
    reader = RunDirectory(tmp_path / "run")
    assert reader.is_complete("feedback")
    assert reader.results("feedback") == {"rankings": 12}


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden"])
def test_stage_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain word"):
        RunDirectory(tmp_path).checkpoints(name)


def test_unwritable_place_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="needed a directory that can be written"):
        opened(Path("/proc/nothing/run"))


def test_config_changes_name_every_leaf() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    new = {"a": {"b": 1, "c": [1, 3]}, "e": True}
    assert config_changes(old, new) == {"a.c.1": (2, 3), "e": (None, True)}
    assert config_changes({"a": 1}, {"a": True}) == {"a": (1, True)}


def test_git_revision_of_a_plain_folder_is_none(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_revision(tmp_path) is None, "no commit yet"
    environment = {**os.environ, **{f"GIT_{r}_{k}": "x" for r in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")}}
    subprocess.run(["git", "-C", tmp_path, "commit", "-q", "--allow-empty", "-m", "x"], check=True, env=environment)
    revision = git_revision(tmp_path)
    assert revision is not None and len(revision["revision"]) == 40 and revision["changed"] is False


def test_config_file_is_plain_yaml(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        assert yaml.safe_load(run.config.read_text())["stages"][1]["name"] == "sft"


def test_a_reader_that_looks_at_the_lock_keeps_no_driver_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path / "run").close()
    reader = os.open(tmp_path / "run" / ".lock", os.O_RDONLY)
    try:
        fcntl.flock(reader, fcntl.LOCK_SH)  # as ``is_held`` does
        monkeypatch.setattr("rlhf.runs.directory.time.sleep", lambda seconds: fcntl.flock(reader, fcntl.LOCK_UN))
        with opened(tmp_path / "run") as run:
            assert run.is_held()
    finally:
        os.close(reader)
