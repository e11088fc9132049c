"""What the driver makes of a training that failed under Ray Train; Ray's errors, no cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from actors import training
from actors.deepspeed.config import DeepSpeedConfig
from actors.restarts import ProgressBudget
from actors.settings import LearnerConfig
from actors.training import failure_of, fit_with_restarts
from rlhf.errors import ConfigError, DataError, LearnerError, NonFiniteError, PlacementError, RlhfError
from tests.actors.test_offline_data import make_job

DATA = DataError("groups", found="none", needed="some", action="Label first.")
SETTINGS = ConfigError("stage sft", found="batches of 1", needed="2", action="Raise groups_per_step.")
NOT_FINITE = NonFiniteError("learner", found="NaN", needed="numbers", action="Lower the rate.")
COLLECTIVE = LearnerError("rank 0", found="no answer", needed="every rank", action="See the logs.")
LOST = WorkerHealthCheckFailedError("a worker died", RuntimeError("killed"))


def failed(*causes: Exception) -> WorkerGroupError:
    return WorkerGroupError("Traceback: very long", dict(enumerate(causes)))


class Training:
    """A ``fit`` that fails with the given errors, one a call, and then succeeds."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)


def run(training: Training, tmp_path: Path, max_restarts: int = 3) -> list[tuple[str, dict[str, Any]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    fit_with_restarts(
        training,
        "sft",
        ProgressBudget(max_restarts, lambda: 0),
        stop_request=tmp_path / "stop",
        on_event=lambda kind, fields: events.append((kind, dict(fields))),
    )
    return events


@pytest.mark.parametrize(
    ("causes", "expected"),
    [
        ([RuntimeError("connection closed"), DATA], DATA),
        ([COLLECTIVE, SETTINGS], SETTINGS),
        ([NOT_FINITE, NOT_FINITE], NOT_FINITE),
        ([LOST, COLLECTIVE], COLLECTIVE),
    ],
)
def test_the_ranks_own_error_comes_out(causes: list[Exception], expected: RlhfError) -> None:
    assert failure_of(failed(*causes), "sft") is expected


def test_an_unknown_failure_is_a_learner_error_with_its_cause() -> None:
    error = failure_of(failed(RuntimeError("connection closed"), KeyError("weights")), "sft")
    assert isinstance(error, LearnerError)
    assert (error.where, error.found) == ("stage sft", "KeyError: 'weights'")
    assert "very long" not in str(error)


@pytest.mark.parametrize("fault", [DATA, SETTINGS, NOT_FINITE, KeyError("weights")])
def test_what_is_the_same_every_time_is_tried_once(tmp_path: Path, fault: Exception) -> None:
    training = Training(*[failed(RuntimeError("connection closed"), fault)] * 4)
    with pytest.raises(RlhfError) as caught:
        run(training, tmp_path)
    assert training.calls == 1
    assert caught.value is fault or "weights" in caught.value.found


def test_a_lost_gang_starts_again_and_says_so(tmp_path: Path) -> None:
    training = Training(failed(LOST), failed(COLLECTIVE, RuntimeError("connection closed")))
    events = run(training, tmp_path)
    assert training.calls == 3
    assert [(kind, fields["role"], fields["restarts_left"]) for kind, fields in events] == [
        ("gang_lost", "learner", 3),
        ("gang_lost", "learner", 2),
    ]


def test_restarts_end_with_their_number_and_with_a_stop(tmp_path: Path) -> None:
    training = Training(*[failed(LOST)] * 9)
    with pytest.raises(LearnerError, match="killed"):
        run(training, tmp_path, max_restarts=2)
    assert training.calls == 3
    (tmp_path / "stop").touch()
    training = Training(failed(LOST))
    with pytest.raises(LearnerError):
        run(training, tmp_path)
    assert training.calls == 1


def test_no_room_for_the_ranks_is_a_placement_error(tmp_path: Path) -> None:
    training = Training(ControllerError(WorkerGroupStartupTimeoutError(2)))
    with pytest.raises(PlacementError) as caught:
        run(training, tmp_path)
    assert (training.calls, caught.value.exit_code) == (1, 3)


@pytest.mark.parametrize(("seconds", "whole"), [(90.0, 90), (0.4, 1)])
def test_ranks_wait_for_each_other_as_long_as_the_learner_section_says(
    seconds: float, whole: int, tmp_path: Path, monkeypatch
) -> None:
    told: dict[str, Any] = {}

    class Trainer:
        def __init__(self, train: Any, **options: Any) -> None:
            told.update(options)

        def fit(self) -> None:
            pass

    monkeypatch.setattr(training, "TorchTrainer", Trainer)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "")  # set by the call, and put back after the test
    learner = LearnerConfig(deepspeed=DeepSpeedConfig(collective_timeout_s=seconds))
    job = dataclasses.replace(make_job(tmp_path, "sft"), learner=learner)
    options: dict[str, Any] = {"num_ranks": 2, "cpus": 1, "gpus": 0, "strategy": "PACK", "max_restarts": 0}
    training.fit_ranks(lambda config: None, job, start_timeout_s=60.0, **options)
    assert (told["torch_config"].backend, told["torch_config"].timeout_s) == ("gloo", whole)
