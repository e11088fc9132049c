"""What may change of a configuration when a run is resumed, and what did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

RESUMABLE_KEYS = (
    "**.steps",
    "**.epochs",
    "**.evaluate_every",
    "**.checkpoint_every",
    "**.keep_checkpoints",
    "**.*timeout_s",
    "**.max_missing_fraction",
    "run_dir",
    "roles.*.replicas",
    "roles.*.autoscale",
    "roles.*.autoscale.**",
    "roles.*.ranks",
    "roles.*.resources.**",
    "**.deepspeed.**",
    "checkpoints.in_background",
    "recorder.**",
    "ray.**",
    "gate",
    "criteria.**",
)
"""Keys that may change when a run is resumed: how long, how often, where and on how many ranks, how much may be
missing, and how it is judged in the end. Nothing may change of a stage that is complete. ``*`` stands for any text
inside one part of a dotted key, ``**`` for any number of parts."""


def config_changes(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Differences of two plain documents by dotted key; a key on one side only counts as None on the other."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(str(name), old.get(name), new.get(name)) for name in [*old, *(n for n in new if n not in old)]]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), left, right) for index, (left, right) in enumerate(zip(old, new, strict=True))]
    else:
        return {} if old == new and type(old) is type(new) else {key: (old, new)}
    changes: dict[str, tuple[Any, Any]] = {}
    for name, left, right in pairs:
        changes |= config_changes(left, right, f"{key}.{name}" if key else name)
    return changes


def matches_any(key: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted key is one that the patterns name; see ``RESUMABLE_KEYS``."""
    return any(_matches(key.split("."), pattern.split(".")) for pattern in patterns)


def _matches(key: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not key
    if pattern[0] == "**":
        return any(_matches(key[start:], pattern[1:]) for start in range(len(key) + 1))
    return bool(key) and fnmatchcase(key[0], pattern[0]) and _matches(key[1:], pattern[1:])
