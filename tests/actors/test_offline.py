"""Bookkeeping of an offline stage's rank: what it resumes from, and what it says of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from actors import offline
from actors.offline import KEEP_CHECKPOINTS, OfflineJob, _Session, _TimedLearner
from actors.settings import LearnerConfig
from rlhf.errors import CheckpointError
from rlhf.loops.offline import OfflineConfig
from rlhf.objectives.config import SupervisedConfig
from rlhf.runs import checkpoint
from rlhf.runs.checkpoint_config import CheckpointConfig
from rlhf.runs.events import read_events
from rlhf.runs.follow import STEPS_KNOWN
from rlhf.runs.places import FileEntry, SaveStatus, fetch_file, write_file


class FakeWorker:
    """The one rank of a gang; its state is a number in a file. In the background it is written at the second look."""

    def __init__(self, state: int = 0) -> None:
        self.state = state
        self.writing: tuple[str, int] | None = None
        self.looked = False

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def save(self, place: str) -> dict[str, FileEntry]:
        return {"state": write_file(place, "state", [str(self.state).encode()])}

    def begin_save(self, place: str) -> None:
        self.writing, self.looked = (place, self.state), False

    def saved(self, wait_s: float = 0.0) -> SaveStatus:
        assert self.writing is not None
        if not self.looked:
            self.looked = True
            return SaveStatus()
        place, state = self.writing
        return SaveStatus({"state": write_file(place, "state", [str(state).encode()])})

    def verify(self, place: str, files: dict[str, FileEntry]) -> str:
        try:
            fetch_file(place, "state", files["state"], None)
        except CheckpointError as error:
            return error.found
        return ""

    def load(self, place: str) -> None:
        self.state = int((Path(place) / "state").read_text())


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


def session_of(job: OfflineJob, worker: FakeWorker, rank: int = 0) -> _Session:
    learner: Any = worker
    return _Session(job, learner, rank)


def save_steps(job: OfflineJob, *steps: int) -> None:
    for step in steps:
        session_of(job, FakeWorker(step)).hooks().checkpoint(step)


def test_a_rank_resumes_from_the_newest_checkpoint_and_says_from_which(job: OfflineJob) -> None:
    assert session_of(job, FakeWorker()).resume() == 0
    save_steps(job, 1, 2, 3)
    worker = FakeWorker()
    assert session_of(job, worker).resume() == worker.state == 3
    [event] = read_events(job.run_dir / "events.jsonl")
    assert (event["kind"], event["stage"], event["step"]) == ("stage_resumed", "sft", 3)
    assert len(checkpoint.steps(job.run_dir / "checkpoints" / "sft")) == KEEP_CHECKPOINTS


def test_a_fallback_to_an_older_checkpoint_is_an_event(job: OfflineJob) -> None:
    save_steps(job, 1, 2)
    (job.run_dir / "checkpoints" / "sft" / "step_2" / "state").write_text("9")
    worker = FakeWorker()
    assert session_of(job, worker).resume() == worker.state == 1
    events = read_events(job.run_dir / "events.jsonl")
    assert [(event["kind"], event["stage"]) for event in events] == [
        ("checkpoint_rejected", "sft"),
        ("checkpoint_pointer_mended", "sft"),
        ("stage_resumed", "sft"),
    ]
    assert "altered" in json.dumps(events[0])


def test_in_the_background_a_checkpoint_exists_once_it_is_written(job: OfflineJob) -> None:
    job = dataclasses.replace(job, checkpoints=CheckpointConfig(in_background=True))
    folder = job.run_dir / "checkpoints" / "sft"
    worker = FakeWorker(1)
    session = session_of(job, worker)
    hooks = session.hooks()
    hooks.checkpoint(1)
    worker.state = 2
    assert not hooks.should_stop() and checkpoint.steps(folder) == [], "still being written"
    assert not hooks.should_stop() and checkpoint.steps(folder) == [1]
    hooks.checkpoint(2)
    worker.state = 3
    hooks.checkpoint(3)
    assert checkpoint.steps(folder) == [2, 1], "one at a time: the next one waits"
    session.end()
    assert checkpoint.steps(folder) == [3, 2]
    resumed = FakeWorker()
    assert session_of(job, resumed).resume() == resumed.state == 3


def test_a_skipped_update_is_an_event_that_names_its_batch(job: OfflineJob) -> None:
    hooks = session_of(job, FakeWorker()).hooks()
    hooks.log(1, {"loss": 1.0, "skipped": 0.0}, ["a", "b"])
    hooks.log(2, {"skipped": 1.0}, ["c", "d"])
    [event] = read_events(job.run_dir / "events.jsonl")
    assert (event["kind"], event["step"], event["uids"]) == ("update_skipped", 2, ["c", "d"])


def test_rank_0_says_how_many_steps_there_are(job: OfflineJob) -> None:
    for rank in (0, 1):
        session_of(job, FakeWorker(), rank).say_steps(3, 8)
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
