"""What workers say of their own health, without Ray."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from actors.health import ProbedLoop, ProbedThread, format_stacks, observed


class Counter(ProbedThread):
    """Waits in its work until it is let go."""

    def __init__(self) -> None:
        self.go_on = threading.Semaphore(0)

    @observed
    def work(self, num_items: int, *, fail: bool = False) -> int:
        for _ in range(num_items):
            assert self.go_on.acquire(timeout=30)
            self.progress()
        if fail:
            raise ValueError("a defect")
        return num_items


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_worker_at_work_tells_how_long_it_has_made_no_progress() -> None:
    worker = Counter()
    assert (worker.probe().num_done, worker.probe().stalled_s) == (0, 0.0)
    thread = threading.Thread(target=worker.work, args=(2,))
    thread.start()
    wait_for(lambda: worker.probe().stalled_s > 0.05)
    before = worker.probe()
    worker.go_on.release()
    wait_for(lambda: worker.probe().num_done > before.num_done)
    assert "work" in worker.stacks() and f"thread {thread.name}" in worker.stacks()
    worker.go_on.release()
    thread.join(30)
    assert worker.probe().stalled_s == 0.0, "idle is not stalled"


def test_work_that_fails_is_no_longer_at_work() -> None:
    worker = Counter()
    with pytest.raises(ValueError, match="a defect"):
        worker.work(0, fail=True)
    assert worker.probe().stalled_s == 0.0
    assert worker.work(0) == 0


class Sleeper(ProbedLoop):
    """Waits for an event deep inside two coroutines."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()

    async def nap(self) -> None:
        with self.at_work():
            await self._deeper()

    async def _deeper(self) -> None:
        await self.woken.wait()


def test_overlapping_work_of_an_event_loop_and_where_its_tasks_wait() -> None:
    async def body() -> None:
        worker = Sleeper()
        naps = [asyncio.create_task(worker.nap(), name=f"nap {i}") for i in range(2)]
        await asyncio.sleep(0.02)
        assert (await worker.probe()).stalled_s > 0
        text = await asyncio.to_thread(worker.stacks)  # as from Ray's health thread
        assert "task nap 0" in text and "task nap 1" in text and "_deeper" in text
        naps[0].cancel()
        await asyncio.gather(naps[0], return_exceptions=True)
        before = await worker.probe()
        await asyncio.sleep(0.02)
        assert (await worker.probe()).stalled_s > before.stalled_s, "the other is still at it"
        worker.woken.set()
        await naps[1]
        assert (await worker.probe()).stalled_s == 0.0

    asyncio.run(body())


def test_stacks_name_the_process_and_this_line() -> None:
    text = format_stacks([])
    assert text.startswith("process ") and "test_stacks_name_the_process_and_this_line" in text
