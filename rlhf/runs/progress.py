"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO


@dataclass(frozen=True, slots=True)
class Steps:
    """How far some work is.

    Attributes:
        done: Steps done, those of earlier drivers included.
        total: Steps in all.
        here: Steps done by this driver, those that it did again not counted twice.
        seconds: How long this driver has been at it.
    """

    done: int
    total: int
    here: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None before the first step."""
        return self.seconds / self.here * max(self.total - self.done, 0) if self.here > 0 else None


class Progress:
    """Shows how far a stage is. Use as a context manager; ``advance`` after each step.

    Args:
        label: What is being done, for example ``"rl"``.
        total: Steps in all.
        done: Steps that an earlier driver has done.
        stream: Where to write; a terminal gets a bar, anything else lines.
        interval_s: Least time between two plain lines; the first and the last are always written.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._done = done
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = interval_s
        self._clock = clock
        self._started = self._last = clock()
        self._first = done
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bar = Bar(*columns, console=Console(file=self._stream))
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def steps(self) -> Steps:
        """Where it is now."""
        return Steps(self._done, self._total, self._done - self._first, self._clock() - self._started)

    def advance(self, steps: int = 1, **values: float) -> None:
        """Moves on by ``steps`` and shows a few numbers beside, for example ``reward=0.31``."""
        self.reach(self._done + steps, **values)

    def reach(self, done: int, **values: float) -> None:
        """Goes to a step; a place before the last one is where work that was lost is done again."""
        before, self._done = self._done, done
        note = " ".join(f"{name}={value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        now = self._clock()
        first = before == self._first
        if first or self._done >= self._total or now - self._last >= self._interval_s:
            self._last = now
            self._stream.write(self._line(now, note) + "\n")
            self._stream.flush()

    def _line(self, now: float, note: str) -> str:
        steps = Steps(self._done, self._total, self._done - self._first, now - self._started)
        passed, left = clock_time(steps.seconds), clock_time(steps.seconds_left or 0.0)
        line = f"{self._label}: {self._done}/{self._total}, {passed} passed, {left} left"
        return f"{line}, {note}" if note else line


def clock_time(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
