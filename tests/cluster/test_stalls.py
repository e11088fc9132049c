"""The stall watchdog: everybody's stacks, once per stall."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorDiedError

from cluster.stalls import StallWatch


class FakeWorker:
    """An actor handle whose ``stacks`` answers, or whose process is gone."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer

    @property
    def stacks(self) -> Any:
        return SimpleNamespace(options=self._options)

    def _options(self, *, concurrency_group: str) -> Any:
        assert concurrency_group == "health"
        return SimpleNamespace(remote=self._remote)

    def _remote(self) -> Any:
        future: Future[str] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        else:
            future.set_result(self.answer)
        return SimpleNamespace(future=lambda: future)


class Watched:
    def __init__(self, run: Path, timeout_s: float) -> None:
        self.run = run
        self.mark = 0
        self.events: list[dict[str, Any]] = []
        workers = {"judge[0]": FakeWorker("thread of the judge"), "learner[1]": FakeWorker(ActorDiedError())}
        self.watch = StallWatch(run, self._event, timeout_s, actors=lambda: workers, progress=lambda: self.mark)

    def _event(self, kind: str, **fields: Any) -> None:
        assert kind == "stalled"
        self.events.append(fields)
        self.mark += 1  # as a line in events.jsonl changes what is looked at


def drive(watched: Watched, body: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        task = asyncio.create_task(watched.watch.run())
        try:
            async with asyncio.timeout(30):
                await body()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_a_run_that_stands_still_is_told_once_until_it_goes_on(tmp_path: Path) -> None:
    watched = Watched(tmp_path, timeout_s=0.2)

    async def body() -> None:
        while not watched.events:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.6)
        assert len(watched.events) == 1
        watched.mark += 1
        while len(watched.events) < 2:
            await asyncio.sleep(0.01)

    drive(watched, body)
    first = watched.events[0]
    assert first["who"] == "the run" and first["seconds"] >= 0.2
    text = (tmp_path / first["stacks"]).read_text()
    assert text.startswith("=== driver\nprocess ")
    assert "=== judge[0]\nthread of the judge" in text
    assert "=== learner[1]\nno stacks: learner[1].stacks: found ActorDiedError" in text
    assert "stall watchdog" in text or "task Task-" in text


def test_workers_that_stall_together_are_written_once(tmp_path: Path) -> None:
    watched = Watched(tmp_path, timeout_s=100.0)

    async def body() -> None:
        await asyncio.gather(watched.watch.stalled("judge[0]", 7.0), watched.watch.stalled("judge[1]", 7.0))
        assert [event["who"] for event in watched.events] == ["judge[0]"]

    drive(watched, body)


def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path) -> None:
    watched = Watched(tmp_path, timeout_s=100.0)
    (tmp_path / "stacks").write_text("a file where the folder would be")

    async def body() -> None:
        await watched.watch.stalled("judge[0]", 7.0)
        assert watched.events == []

    drive(watched, body)
