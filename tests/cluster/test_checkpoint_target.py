"""Where checkpoints may go: a plain URL without secrets, and a place of the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cluster.checkpoints import claim_target
from rlhf.config import validate
from rlhf.errors import ConfigError
from rlhf.runs.checkpoint_config import CheckpointConfig
from rlhf.runs.directory import RunDirectory


class Recipe(BaseModel):
    name: str = "x"


def checked(**fields: Any) -> CheckpointConfig:
    return validate(CheckpointConfig, fields, "test")


@pytest.mark.parametrize(
    "target",
    [
        "s3://key:secret@bucket/runs",
        "s3://bucket/runs?aws_secret_access_key=x",
        "gs://bucket/runs#token",
        "simplecache::s3://bucket/runs",
        "memory://runs",
        "runs/first",
        "/runs/first",
        "file://",
        "",
    ],
)
def test_what_holds_a_secret_or_is_no_lasting_storage_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="target"):
        checked(target=target)


def test_each_stage_has_a_place_below_the_target(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert checked().place(run, "rl") == str(tmp_path / "checkpoints" / "rl")
    assert checked(target="s3://bucket/first/").place(run, "rl") == "s3://bucket/first/rl"
    with pytest.raises(ConfigError, match="a plain word"):
        checked(target="s3://bucket/first").place(run, "../other")


@pytest.mark.parametrize(("given", "cpu", "gpu"), [(None, False, True), (True, True, True), (False, False, False)])
def test_copies_are_written_in_the_background_where_learners_have_gpus(given: Any, cpu: bool, gpu: bool) -> None:
    config = checked(in_background=given)
    assert config.writes_in_background(on_gpus=False) is cpu
    assert config.writes_in_background(on_gpus=True) is gpu


def test_a_target_is_one_run_s_own(tmp_path: Path) -> None:
    config = checked(target=f"file://{tmp_path}/store")
    with RunDirectory.open(tmp_path / "first", Recipe()) as first:
        claim_target(config, first)
        claim_target(config, first)
    with RunDirectory.open(tmp_path / "first", Recipe()) as again:
        claim_target(config, again)
    refused = pytest.raises(ConfigError, match="the checkpoints of another run")
    with RunDirectory.open(tmp_path / "second", Recipe()) as second, refused:
        claim_target(config, second)
    assert not (tmp_path / "second" / "config.yaml").exists(), "a refused run leaves no directory"
    claim_target(checked(), RunDirectory(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_an_unknown_protocol_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run", Recipe()) as run, pytest.raises(ConfigError, match="checkpoints.target"):
        claim_target(checked(target="nowhere://bucket/runs"), run)


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused = pytest.raises(ConfigError, match="a storage that can be read and written")
    with RunDirectory.open(tmp_path / "run", Recipe()) as run, refused:
        claim_target(checked(target=f"file://{tmp_path}/file/store"), run)
