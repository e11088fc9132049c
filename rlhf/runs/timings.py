"""Seconds per stage and phase, tokens per second per role; they add up over resumes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.runs.files import read_json, write_json


class Timings:
    """Adds up durations under names like ``"rl/generate"`` (stage/phase). Safe to use from threads and coroutines.

    Phases may overlap, so the phases of a stage need not sum to the stage; time a stage under ``"rl/total"``.

    Args:
        path: JSON file that earlier drivers of the same run left totals in; None keeps them in memory.
        clock: Seconds that only grow.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, list[float]] = {}
        if path is not None and path.is_file():
            document = read_json(path)
            self._seconds = dict(document["seconds"])
            self._tokens = {role: list(pair) for role, pair in document["tokens"].items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block, also one that raises; ``name`` is ``"stage/phase"``."""
        started = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - started)

    def add(self, name: str, seconds: float) -> None:
        """Adds a duration that was measured elsewhere."""
        if "/" not in name:
            raise ValueError(f"{name!r} is not of the form stage/phase")
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def add_tokens(self, role: str, tokens: int, seconds: float) -> None:
        """Adds tokens that a role worked through and the time it took."""
        with self._lock:
            pair = self._tokens.setdefault(role, [0.0, 0.0])
            pair[0] += tokens
            pair[1] += seconds

    def totals(self) -> dict[str, dict[str, float]]:
        """Seconds by stage, then by phase."""
        with self._lock:
            seconds = dict(self._seconds)
        stages: dict[str, dict[str, float]] = {}
        for name, value in seconds.items():
            stage, _, phase = name.partition("/")
            stages.setdefault(stage, {})[phase] = round(value, 3)
        return stages

    def tokens(self) -> dict[str, tuple[float, float]]:
        """Tokens that each role worked through, and the seconds that it took."""
        with self._lock:
            return {role: (tokens, seconds) for role, (tokens, seconds) in self._tokens.items()}

    def throughput(self) -> dict[str, float]:
        """Tokens per second by role, over the time that the role was at work."""
        with self._lock:
            return {role: round(tokens / seconds, 3) for role, (tokens, seconds) in self._tokens.items() if seconds > 0}

    def write(self) -> None:
        """Writes the totals for the next driver of this run; does nothing without a path."""
        if self._path is not None:
            with self._lock:
                document = {"seconds": dict(self._seconds), "tokens": dict(self._tokens)}
            write_json(self._path, document)
