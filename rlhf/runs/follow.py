"""Progress of work in other processes, as they write it down in the run directory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, TextIO

from rlhf.runs.progress import Progress, Steps

STEPS_KNOWN = "training_started"
"""Event with which an offline stage says how many steps it has, and how many an earlier driver has done."""

_LOSSES = ("loss", "nll")
"""Metrics that are shown beside the steps end so; those of held-out groups have a prefix."""


class NewLines:
    """Hands out each JSON line that others append to a file once, from now on.

    A file that was replaced or cut short is read from its beginning; a line without its end waits for the rest.

    Args:
        path: The file; it may come later.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = self._state()

    def _state(self) -> tuple[int, int]:
        if not self._path.is_file():
            return 0, 0
        found = self._path.stat()
        return found.st_ino, found.st_size

    def read(self) -> list[dict[str, Any]]:
        """The lines since the last call."""
        inode, size = self._state()
        if inode != self._inode or size < self._offset:
            self._inode, self._offset = inode, 0
        if size == self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        return [document for line in whole.split(b"\n") if isinstance(document := _parsed(line), dict)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line) if line.strip() else None
    except (json.JSONDecodeError, UnicodeDecodeError):  # half of a line, left by a crash
        return None


class FollowedProgress:
    """Shows how far a stage is from its lines in ``events.jsonl`` and ``metrics.jsonl``; ``update`` reads what is new.

    Args:
        stage: Whose lines.
        events: Where ``STEPS_KNOWN`` comes; nothing is shown before.
        metrics: A line per step.
        stream: See ``Progress``.
    """

    def __init__(self, stage: str, events: Path, metrics: Path, *, stream: TextIO | None = None) -> None:
        self._stage = stage
        self._events, self._metrics = NewLines(events), NewLines(metrics)
        self._stream = stream
        self._bar: Progress | None = None
        self._open = contextlib.ExitStack()

    @property
    def steps(self) -> Steps | None:
        """Where it is now; None before that is known."""
        return None if self._bar is None else self._bar.steps

    def update(self) -> None:
        """Shows the newest step, if there is one."""
        for event in self._events.read():
            if event.get("kind") == STEPS_KNOWN and event.get("stage") == self._stage and self._bar is None:
                bar = Progress(self._stage, event["steps"], done=event["done"], stream=self._stream)
                self._bar = self._open.enter_context(bar)
        if self._bar is None:
            return
        lines = [line for line in self._metrics.read() if line.get("stage") == self._stage]
        if lines:
            found = lines[-1]["metrics"].items()
            losses = {name: value for name, value in found if name.endswith(_LOSSES) and "/" not in name}
            self._bar.reach(lines[-1]["step"], **{name: value for name, value in losses.items() if value is not None})

    def close(self) -> None:
        """Ends the bar."""
        self._open.close()
