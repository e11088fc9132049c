"""Bookkeeping of an offline stage's rank: what it resumes from, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors import offline
from actors.offline import KEEP_CHECKPOINTS, OfflineJob, _Session, _TimedLearner
from actors.settings import LearnerConfig
from rlhf.loops.offline import OfflineConfig
from rlhf.objectives.config import SupervisedConfig
from rlhf.runs import checkpoint
from rlhf.runs.events import read_events
from rlhf.runs.follow import STEPS_KNOWN


class FakeWorker:
    """The one rank of a gang; its state is a number in a file."""

    def __init__(self, state: int = 0) -> None:
        self.state = state

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass

    def save(self, directory: Path) -> None:
        (directory / "state").write_text(str(self.state))

    def load(self, directory: Path) -> None:
        self.state = int((directory / "state").read_text())


@pytest.fixture
def job(tmp_path: Path) -> OfflineJob:
    return OfflineJob(
        kind="sft",
        learner=LearnerConfig(),
        objective=SupervisedConfig(),
        loop=OfflineConfig(),
        run_dir=tmp_path,
        stage="sft",
        target=tmp_path / "policy",
        groups=tmp_path / "groups",
        records=None,
        held_out_fraction=0.0,
        min_score=0.0,
        max_sequence_tokens=64,
        seed=0,
        threads=1,
        temperature=1.0,
    )


def save_steps(job: OfflineJob, *steps: int) -> None:
    for step in steps:
        _Session(job, FakeWorker(step), 0).hooks().checkpoint(step)


def test_a_rank_resumes_from_the_newest_checkpoint_and_says_from_which(job: OfflineJob) -> None:
    assert _Session(job, FakeWorker(), 0).resume() == 0
    save_steps(job, 1, 2, 3)
    worker = FakeWorker()
    assert _Session(job, worker, 0).resume() == worker.state == 3
    [event] = read_events(job.run_dir / "events.jsonl")
    assert (event["kind"], event["stage"], event["step"]) == ("stage_resumed", "sft", 3)
    assert len(checkpoint.steps(job.run_dir / "checkpoints" / "sft")) == KEEP_CHECKPOINTS


def test_a_fallback_to_an_older_checkpoint_is_an_event(job: OfflineJob) -> None:
    save_steps(job, 1, 2)
    (job.run_dir / "checkpoints" / "sft" / "step_2" / "state").write_text("9")
    worker = FakeWorker()
    assert _Session(job, worker, 0).resume() == worker.state == 1
    events = read_events(job.run_dir / "events.jsonl")
    assert [(event["kind"], event["stage"]) for event in events] == [
        ("checkpoint_rejected", "sft"),
        ("checkpoint_pointer_mended", "sft"),
        ("stage_resumed", "sft"),
    ]
    assert "altered" in json.dumps(events[0])


def test_a_skipped_update_is_an_event_that_names_its_batch(job: OfflineJob) -> None:
    hooks = _Session(job, FakeWorker(), 0).hooks()
    hooks.log(1, {"loss": 1.0, "skipped": 0.0}, ["a", "b"])
    hooks.log(2, {"skipped": 1.0}, ["c", "d"])
    [event] = read_events(job.run_dir / "events.jsonl")
    assert (event["kind"], event["step"], event["uids"]) == ("update_skipped", 2, ["c", "d"])


def test_rank_0_says_how_many_steps_there_are(job: OfflineJob) -> None:
    for rank in (0, 1):
        _Session(job, FakeWorker(), rank).say_steps(3, 8)
    [event] = read_events(job.run_dir / "events.jsonl")
    assert (event["kind"], event["stage"], event["done"], event["steps"]) == (STEPS_KNOWN, "sft", 3, 8)


def test_the_time_of_a_learner_is_that_of_its_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(offline.time, "monotonic", lambda: now[0])

    class Worker:
        def train_step(self, groups: Any) -> dict[str, float]:
            now[0] += 2.0
            return {"loss": 1.0}

        def evaluate(self, groups: Any) -> dict[str, float]:
            now[0] += 100.0
            return {"loss": 0.5}

    worker: Any = Worker()
    timed = _TimedLearner(worker)
    assert [timed.train_step([]), timed.evaluate([]), timed.train_step([])] == [{"loss": x} for x in (1.0, 0.5, 1.0)]
    assert timed.seconds == 4.0
