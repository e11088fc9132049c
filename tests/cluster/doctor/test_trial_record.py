"""What the doctor reads from the record of its small run; the run itself is in ``test_trial.py``."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.config import RunConfig
from cluster.doctor.trial import _last_error, judge_trial, recipe_of
from rlhf.config import validate
from rlhf.runs.events import EventLog
from rlhf.runs.metrics import MetricsLogger

STEPS = ["trial: Ray", "trial: generation", "trial: update", "trial: publication", "trial: end"]


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
@pytest.mark.parametrize("num_gpus", [0, 1, 2, 8])
def test_its_recipe_is_valid_on_any_number_of_gpus(tmp_path: Path, num_gpus: int, address: str | None):
    config = validate(RunConfig, recipe_of(tmp_path, num_gpus, address), "doctor")
    assert config.ray.address == address
    assert config.roles.learner.resources.gpus == {0: 0.0, 1: 0.4}.get(num_gpus, 1.0)


def test_a_run_that_never_began_is_one_error_and_the_rest_is_not_reached(tmp_path: Path):
    checks = judge_trial(tmp_path / "run", time.time(), 3, "ClusterError: no room")
    assert [check.name for check in checks] == STEPS
    assert [check.found for check in checks] == ["ClusterError: no room"] + ["not reached"] * 4


def test_an_engine_that_fails_is_told_from_ray(tmp_path: Path):
    EventLog(tmp_path / "events.jsonl").record("stage_started", stage="rl")
    checks = judge_trial(tmp_path, time.time(), 1, "EngineError: no kernel")
    assert [check.ok for check in checks] == [True, False, False, False, False]
    assert checks[1].found == "EngineError: no kernel"


def test_an_update_that_is_skipped_is_no_update(tmp_path: Path):
    metrics = MetricsLogger(tmp_path / "metrics.jsonl")
    metrics.log("rl", 1, {"learner/skipped": 1.0})
    from cluster.doctor.trial import _reached

    assert "update" not in _reached(tmp_path, time.time(), 1)
    metrics.log("rl", 2, {"learner/skipped": 0.0})
    assert "update" in _reached(tmp_path, time.time(), 1)


@pytest.mark.parametrize(
    ("text", "code", "found"),
    [
        ("stage rl\nEngineError: x: found y; needed z. Do.\nsome more\n", 1, "EngineError: x: found y; needed z. Do."),
        ("Traceback\n  File\nModuleNotFoundError: No module named 'torch'\n", 1, "ModuleNotFoundError: No module"),
        ("only words\n", 137, "only words"),
        ("", 139, "exit code 139 without a word"),
        ("", None, "no end after 9 s"),
    ],
)
def test_the_last_error_is_found_in_the_log(tmp_path: Path, text: str, code: int | None, found: str):
    log = tmp_path / "log"
    log.write_text(text)
    assert _last_error(log, code, 9.0).startswith(found)
