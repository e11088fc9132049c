"""Signals to the driver: the first lets the stage save, the second ends it where it is. No Ray in here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import context as context_module
from cluster import runner
from rlhf.errors import NonFiniteError, RecordError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.events import EventLog, read_events
from rlhf.runs.summary import total_seconds
from rlhf.runs.timings import Timings


class Context:
    """What ``_drive`` needs of a run's context; ``log`` holds what happened."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.stopping = asyncio.Event()
        self.timings = Timings()
        self.run = SimpleNamespace(complete=lambda name, results: log.append(f"{name} complete"))

    def event(self, kind: str, **fields: Any) -> None:
        self.log.append(kind)

    def request_stop(self) -> None:
        self.stopping.set()

    async def make_room(self, stage: Any) -> None:
        pass


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    log: list[str] = []

    @contextlib.asynccontextmanager
    async def open_context(*args: Any) -> AsyncIterator[Context]:
        try:
            yield Context(log)
        finally:
            await asyncio.sleep(0.01)  # closing takes time and is not interrupted
            log.append("closed")

    monkeypatch.setattr(context_module, "open_context", open_context)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield log
    for number, handler in handlers.items():
        signal.signal(number, handler)


def drive(monkeypatch: pytest.MonkeyPatch, work: Any, kind: str = "rl") -> int:
    monkeypatch.setattr(runner, "_results_of", work)
    stages: Any = [SimpleNamespace(name="one", kind=kind), SimpleNamespace(name="two", kind=kind)]
    config: Any = None
    return asyncio.run(runner._drive(config, RunDirectory(Path()), stages, {}))


async def interrupt(context: Context, number: signal.Signals) -> None:
    """Sends this process a signal and returns when its handler has run."""
    os.kill(os.getpid(), number)
    while not context.stopping.is_set():
        await asyncio.sleep(0)


def test_one_signal_lets_the_stage_save(log: list[str], monkeypatch) -> None:
    async def work(context: Context, stage: Any) -> dict[str, Any]:
        await interrupt(context, signal.SIGTERM)
        await asyncio.sleep(0.05)
        log.append("saved")
        raise context_module.StopRequestedError("stage one", found="a signal", needed="time", action="Again.")

    assert drive(monkeypatch, work) == 143
    assert log == ["stage_started", "saved", "stopped", "closed"]


def test_a_stage_that_has_nothing_to_save_is_left_at_once(log: list[str], monkeypatch) -> None:
    async def work(context: Context, stage: Any) -> dict[str, Any]:
        await interrupt(context, signal.SIGINT)
        await asyncio.sleep(3600)
        return {}

    assert drive(monkeypatch, work, "feedback") == 130
    assert log == ["stage_started", "stopped", "closed"]


@pytest.mark.parametrize("later", [1, 3], ids=["two signals", "and more of them"])
def test_a_second_signal_does_not_wait_and_closing_is_not_interrupted(later: int, log: list[str], monkeypatch) -> None:
    async def work(context: Context, stage: Any) -> dict[str, Any]:
        await interrupt(context, signal.SIGTERM)
        for _ in range(later):
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(3600)
        finally:
            log.append("given up")
        return {}

    assert drive(monkeypatch, work) == 143, "the first signal says the exit code"
    assert log == ["stage_started", "given up", "stopped", "closed"]


def test_a_second_signal_while_closing_changes_nothing(log: list[str], monkeypatch) -> None:
    async def work(context: Context, stage: Any) -> dict[str, Any]:
        await interrupt(context, signal.SIGTERM)
        asyncio.get_running_loop().call_later(0.005, os.kill, os.getpid(), signal.SIGTERM)  # while it closes
        raise context_module.StopRequestedError("stage one", found="a signal", needed="time", action="Again.")

    assert drive(monkeypatch, work) == 143
    assert log == ["stage_started", "stopped", "closed"]


def test_stages_go_on_without_a_signal(log: list[str], monkeypatch) -> None:
    async def work(context: Context, stage: Any) -> dict[str, Any]:
        return {}

    assert drive(monkeypatch, work) == 0
    assert log == [
        *("stage_started", "one complete", "stage_completed"),
        *("stage_started", "two complete", "stage_completed"),
        "closed",
    ]


def test_a_stages_own_time_has_its_waits_and_counts_after_a_failure_too(monkeypatch) -> None:
    now = [0.0]
    timings = Timings(clock=lambda: now[0])
    context: Any = Context([])
    context.timings = timings
    stage: Any = SimpleNamespace(name="one", kind="rl")

    async def work(context: Any, stage: Any) -> dict[str, Any]:
        now[0] += 5.0  # a record, a wait: no phase
        with timings.phase("one/learner"):
            now[0] += 2.0
        if now[0] > 7.0:
            raise RuntimeError("the second time")
        return {}

    monkeypatch.setattr(runner, "_results_of", work)
    asyncio.run(runner._run_stage(context, stage))
    assert timings.totals() == {"one": {"learner": 2.0, "total": 7.0}}
    with pytest.raises(RuntimeError):
        asyncio.run(runner._run_stage(context, stage))
    assert total_seconds(timings.totals()) == 14.0


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteError("learner.update", found="NaN", needed="numbers", action="Lower the rate."),
        ZeroDivisionError("a defect"),
    ],
    ids=["an error of ours", "a defect"],
)
def test_what_ends_a_run_is_in_its_record(error: Exception, tmp_path: Path, monkeypatch) -> None:
    record = EventLog(tmp_path / "events.jsonl")
    context: Any = Context([])
    context.event = record.record

    async def work(context: Any, stage: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(runner, "_results_of", work)
    stage: Any = SimpleNamespace(name="one", kind="rl")
    with pytest.raises(type(error)):
        asyncio.run(runner._run_stage(context, stage))
    _, failed = read_events(record.path)
    assert (failed["kind"], failed["stage"]) == ("stage_failed", "one")
    assert failed["error"] == f"{type(error).__name__}: {error}"


def test_a_record_that_cannot_be_written_does_not_hide_what_ended_the_run(monkeypatch) -> None:
    context: Any = Context([])
    full = RecordError("events.jsonl", found="a full disk", needed="space", action="Free some.")

    def event(kind: str, **fields: Any) -> None:
        if kind == "stage_failed":
            raise full

    async def work(context: Any, stage: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    context.event = event
    monkeypatch.setattr(runner, "_results_of", work)
    stage: Any = SimpleNamespace(name="one", kind="rl")
    with pytest.raises(ZeroDivisionError):
        asyncio.run(runner._run_stage(context, stage))
