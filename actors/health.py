"""What a worker says of its own health: that it answers, that its work goes on, where its threads are.

A probe has to come through while the worker is at work. Workers of coroutines answer it from their event loop, beside
their other calls, and ask their engine on the way. Workers of plain methods work in one thread; Ray answers probes of
them, and looks at anybody's stacks, in a thread of their own: that of ``HEALTH_GROUP``, which every actor is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

HEALTH_GROUP = "health"
"""Ray's concurrency group of probes: a thread beside the one that works."""

_DEEPEST = 200
"""Coroutines of one task that are shown."""

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
WorkerT = TypeVar("WorkerT", bound="Observed")


@dataclass(frozen=True, slots=True)
class Probe:
    """A worker's answer to a probe; that it comes at all says that the worker lives.

    Attributes:
        num_done: Pieces of work done so far (items, batches or tokens, as the worker counts); it only grows.
        stalled_s: Seconds since the last of them, within work that reports its progress; 0 where there is none.
        unfinished_tokens: Tokens that were drawn and not delivered: what would be lost with the worker.
        version: Version of the weights that it serves; None where it serves none, or its weights have no version.
    """

    num_done: int
    stalled_s: float
    unfinished_tokens: int = 0
    version: int | None = None


class Observed:
    """A worker that can be probed. It says what it is at with ``at_work`` and ``progress``."""

    _num_at_work = 0
    _num_done = 0
    _progress_at = 0.0
    _loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """A block in which ``progress`` is made; several may overlap."""
        if not self._num_at_work:
            self._progress_at = time.monotonic()
        with contextlib.suppress(RuntimeError):  # a thread without an event loop
            self._loop = asyncio.get_running_loop()
        self._num_at_work += 1
        try:
            yield
        finally:
            self._num_at_work -= 1
            self.progress()

    def progress(self, num: int = 1) -> None:
        """Counts pieces of work that are done."""
        self._num_done += num
        self._progress_at = time.monotonic()

    def health(self) -> Probe:
        """How the work goes, from what this object knows."""
        stalled_s = time.monotonic() - self._progress_at if self._num_at_work else 0.0
        return Probe(self._num_done, stalled_s)

    def stacks(self) -> str:
        """The Python stacks of every thread, and of the tasks of the event loop that works."""
        return format_stacks([self._loop] if self._loop is not None else [])


class ProbedThread(Observed):
    """An observed worker of plain methods."""

    def probe(self) -> Probe:
        """Answers in a thread of its own; see ``HEALTH_GROUP``."""
        return self.health()


class ProbedLoop(Observed):
    """An observed worker of coroutines."""

    async def probe(self) -> Probe:
        """Answers from the event loop that does the work."""
        return self.health()


def observed(
    method: Callable[Concatenate[WorkerT, P], ResultT],
) -> Callable[Concatenate[WorkerT, P], ResultT]:
    """Marks a plain method of an ``Observed`` worker as work that reports its progress."""

    @functools.wraps(method)
    def at_work(self: WorkerT, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        with self.at_work():
            return method(self, *args, **kwargs)

    return at_work


def format_stacks(loops: Iterable[asyncio.AbstractEventLoop]) -> str:
    """The stacks of this process's threads, and of the unfinished tasks of event loops, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    text = io.StringIO()
    text.write(f"process {os.getpid()}\n")
    for ident, frame in sys._current_frames().items():
        text.write(f"\nthread {names.get(ident, ident)}\n")
        text.writelines(traceback.format_stack(frame))
    for loop in loops:
        for task in asyncio.all_tasks(loop):
            text.write(f"\ntask {task.get_name()}\n")
            text.write(_stack_of(task))
    return text.getvalue()


def _stack_of(task: asyncio.Task[Any]) -> str:
    """The coroutines of a task, down to what it waits for: ``get_stack`` of a waiting task has the first alone."""
    lines = []
    inner: Any = task.get_coro()
    for _ in range(_DEEPEST):
        frames = (getattr(inner, name, None) for name in ("cr_frame", "ag_frame", "gi_frame"))
        frame = next((found for found in frames if found is not None), None)
        if frame is not None:
            lines.append(f"  in {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}\n")
        inner = _awaited(inner, in_python=frame is not None)
        if inner is None:
            break
    return "".join(lines)


def _awaited(inner: Any, *, in_python: bool) -> Any:
    """What a coroutine waits for. One that was compiled, such as Ray's own, does not say, but refers to it."""
    names = (getattr(inner, name, None) for name in ("cr_await", "ag_await", "gi_yieldfrom"))
    found = next((awaited for awaited in names if awaited is not None), None)
    if found is not None or in_python:
        return found
    return next((other for other in gc.get_referents(inner) if _is_waiting(other)), None)


def _is_waiting(thing: Any) -> bool:
    kinds = ("coroutine_wrapper", "async_generator_asend")
    return inspect.iscoroutine(thing) or inspect.isasyncgen(thing) or type(thing).__name__ in kinds
