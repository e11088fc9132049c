"""``status.json``: written whole, read by anybody, and what is to be thought of its age, its lock and its damage."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import StrictModel
from rlhf.errors import ConfigError, RecordError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.status import (
    SILENT_AFTER_S,
    Health,
    RoleStatus,
    RunStatus,
    StageStatus,
    clear_status,
    load_status,
    read_status,
    status_path,
    write_status,
)


class Recipe(StrictModel):
    stages: list[dict[str, str]] = [{"name": "sft"}, {"name": "rl"}]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.open(tmp_path / "run", Recipe()) as directory:
        yield directory


def status(**changes: Any) -> RunStatus:
    moment = time.time()
    known = {"run": "run", "time": moment, "started": moment - 100, "host": socket.gethostname(), "pid": os.getpid()}
    return RunStatus(**(known | changes))


def complete(run: RunDirectory) -> None:
    for name in ("sft", "rl"):
        run.complete(name, {})


def test_what_is_written_is_read_and_nothing_else_is_left(run: RunDirectory) -> None:
    told = status(
        stage=StageStatus(name="rl", done=3, total=10, seconds=12.5, seconds_left=30.0),
        roles=[RoleStatus(role="generation", wanted=2, replicas={"healthy": 2}, version=3, items=8)],
        events=[{"kind": "replica_lost", "role": "generation", "replica": 1}],
    )
    before = set(run.root.iterdir())
    write_status(run.root, told)
    assert load_status(run.root) == told
    assert set(run.root.iterdir()) - before == {status_path(run.root)}


def test_a_status_that_cannot_be_written_says_so_and_leaves_the_old_one(run: RunDirectory, monkeypatch: Any) -> None:
    write_status(run.root, status(pid=1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.runs.status.os.replace", full)
    with pytest.raises(RecordError, match="No space left"):
        write_status(run.root, status(pid=2))
    found = load_status(run.root)
    assert found is not None and found.pid == 1


def test_a_reader_of_another_version_leaves_out_what_it_does_not_know(run: RunDirectory) -> None:
    document = status().model_dump(mode="json") | {"to_come": 1}
    status_path(run.root).write_text(json.dumps(document), encoding="utf-8")
    assert load_status(run.root) is not None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param('{"run": "run", "ti', "status.json:1", id="cut short"),
        pytest.param("", "status.json:1", id="empty, as a crash of the machine leaves it"),
        pytest.param("[]", "the file", id="another document"),
        pytest.param('{"run": "run"}', "time", id="a key is missing"),
        pytest.param('{"run": "r", "time": "soon", "started": 0, "host": "h", "pid": 1}', "time", id="a wrong type"),
    ],
)
def test_a_damaged_status_is_a_problem_that_hides_nothing_else(run: RunDirectory, text: str, named: str) -> None:
    status_path(run.root).write_text(text, encoding="utf-8")
    found = read_status(run.root)
    assert named in found.problem
    assert (found.status, found.held, found.health) == (None, True, Health.STARTING)
    run.close()
    complete(run)
    assert read_status(run.root).health is Health.COMPLETE


def test_a_driver_at_work_is_running_and_one_that_writes_nothing_is_silent(run: RunDirectory) -> None:
    assert read_status(run.root).health is Health.STARTING
    told = status()
    write_status(run.root, told)
    assert read_status(run.root).health is Health.RUNNING
    silent = read_status(run.root, now=told.time + SILENT_AFTER_S + 5)
    assert silent.health is Health.SILENT and silent.age_s == pytest.approx(SILENT_AFTER_S + 5)
    assert not silent.health.is_well


def test_a_clock_that_is_behind_the_drivers_makes_no_negative_age(run: RunDirectory) -> None:
    told = status()
    write_status(run.root, told)
    found = read_status(run.root, now=told.time - 30)
    assert (found.age_s, found.health) == (0.0, Health.RUNNING)


def test_without_a_lock_it_was_killed_or_has_ended_or_is_complete(run: RunDirectory) -> None:
    run.close()
    assert read_status(run.root).health is Health.NEW
    write_status(run.root, status())
    assert read_status(run.root).health is Health.LOST, "however fresh: a lock of this machine would be seen"
    write_status(run.root, status(ended=True))
    found = read_status(run.root)
    assert found.health is Health.ENDED and not found.health.is_well
    complete(run)
    assert read_status(run.root).health is Health.COMPLETE


def test_a_fresh_status_of_another_machine_is_a_sign_of_life_where_locks_do_not_reach(run: RunDirectory) -> None:
    run.close()
    told = status(host="another")
    write_status(run.root, told)
    found = read_status(run.root)
    assert found.health is Health.RUNNING and not found.held
    assert read_status(run.root, now=told.time + SILENT_AFTER_S + 5).health is Health.LOST


def test_a_driver_that_still_closes_is_no_silent_one(run: RunDirectory) -> None:
    told = status(ended=True)
    write_status(run.root, told)
    assert read_status(run.root, now=told.time + SILENT_AFTER_S + 5).health is Health.RUNNING


def test_what_an_earlier_driver_left_is_not_taken_for_the_new_ones(run: RunDirectory) -> None:
    write_status(run.root, status(time=1.0))
    clear_status(run.root)
    clear_status(run.root)
    assert read_status(run.root).health is Health.STARTING


def test_any_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.yaml"):
        read_status(tmp_path)
