"""An event loop whose clock jumps to the next timer: a wait of an hour takes no time, and a deadlock is an error."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any


class DeadlockError(AssertionError):
    """Somebody is waited for, nothing is ready to run and no timer is set: it would be waited for ever."""


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: where the loop would sleep, the clock goes forward instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise DeadlockError("nothing is ready, and no timer is set")
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop in virtual seconds. What is sent to a thread runs in the loop, after ``thread_seconds``."""

    def __init__(self, thread_seconds: float = 0.01) -> None:
        self._clock = _JumpingSelector()
        self._thread_seconds = thread_seconds
        super().__init__(self._clock)
        self._clock_resolution = 1e-6  # with the real clock's a timer far ahead would never be quite due

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Runs ``func`` in the loop; like a thread's work it is done even where nobody waits for it any more."""
        future: asyncio.Future[Any] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:
                if future.done():
                    raise
                future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.call_later(self._thread_seconds, work)
        return future
