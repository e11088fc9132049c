"""Requests to a running driver: small files in ``RUN/control``, so that they need no port and survive a restart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.errors import ConfigError

SCALABLE = ("generation", "judge", "scorer", "reference")
MAX_REPLICAS = 1024


def parse_scale(items: Sequence[str]) -> dict[str, int]:
    """Parses ``ROLE=N`` items; only stateless roles scale while a run goes on."""
    wanted: dict[str, int] = {}
    for item in items:
        role, _, text = item.partition("=")
        if role not in SCALABLE or not text.isdecimal() or not 1 <= int(text) <= MAX_REPLICAS:
            raise ConfigError(
                f"scale {item!r}",
                found="not a stateless role with a count",
                needed=f"ROLE=N with ROLE in {', '.join(SCALABLE)} and N from 1 to {MAX_REPLICAS}",
                action="Learners are sized in the config (roles.learner.ranks) and change at a restart.",
            )
        wanted[role] = int(text)
    return wanted


def _folder(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            str(run), found="no config.yaml", needed="a run directory", action="Name the folder that `rlhf run` made."
        )
    folder = run / "control"
    folder.mkdir(exist_ok=True)
    return folder


def request_scale(run: Path, wanted: Mapping[str, int]) -> None:
    """Leaves the wanted number of replicas for the driver, which looks every second."""
    path = _folder(run) / "scale.json"
    merged = read_scale(run) | dict(wanted)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(merged), encoding="utf-8")
    partial.replace(path)


def read_scale(run: Path) -> dict[str, int]:
    """The wanted replicas by role; empty where nothing was asked."""
    path = run / "control" / "scale.json"
    if not path.is_file():
        return {}
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(wanted, dict):
        raise _unreadable(path, f"a {type(wanted).__name__}")
    return parse_scale([f"{role}={count}" for role, count in wanted.items()])


def _unreadable(path: Path, found: str) -> ConfigError:
    return ConfigError(str(path), found=found, needed="replicas by role, as JSON", action="Remove the file.")


def request_stop(run: Path) -> None:
    """Asks all ranks of an offline stage to save and end."""
    (_folder(run) / "stop").touch()


def clear_stop(run: Path) -> None:
    """Takes an earlier request back, when a driver starts."""
    (run / "control" / "stop").unlink(missing_ok=True)
