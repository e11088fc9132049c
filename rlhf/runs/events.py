"""``events.jsonl``: faults, restarts, scaling, resumes, its end - what happened to a run besides its metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlhf.runs.files import append_json_line, read_json_lines
from rlhf.runs.redact import redact


class EventLog:
    """Appends events; may be used from several processes at once, each with its own object.

    Args:
        path: The file, usually ``RUN/events.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, kind: str, **fields: Any) -> None:
        """Appends one event.

        Args:
            kind: What happened, for example ``"replica_restarted"``.
            **fields: Plain JSON values; anything else is written as its text, secrets are hidden.
        """
        plain = {name: _plain(value) for name, value in fields.items()}
        append_json_line(self.path, {"time": time.time(), "kind": kind} | redact(plain))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Returns the events in the order in which they were written."""
    return read_json_lines(path)
