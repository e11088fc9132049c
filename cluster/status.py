"""``rlhf status RUN``: reads the run directory and shows how the run stands, live on a terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from cluster.status_view import render
from rlhf.runs.status import Health, Reading, read_status

REFRESH_S = 1.0
"""Seconds between two looks of the live view."""


def show_status(run: Path, *, once: bool = False, as_json: bool = False) -> int:
    """Shows a run's status: live on a terminal until it is complete or Ctrl-C, once elsewhere.

    Returns:
        0 for a run that goes on or is complete, 1 for one that does neither.

    Raises:
        ConfigError: Not a run directory.
    """
    reading = read_status(run)
    if as_json:
        print(json.dumps(as_document(reading), indent=2, ensure_ascii=False, allow_nan=False))
    elif once or not sys.stdout.isatty() or reading.health is Health.COMPLETE:
        from rich.console import Console

        Console(highlight=False).print(render(run, reading))
    else:
        reading = _live(run, reading)
    return 0 if reading.health.is_well else 1


def as_document(reading: Reading) -> dict[str, Any]:
    """What was found as plain JSON: ``health``, ``age_s``, ``held``, ``problem``, and the file itself as ``status``."""
    return {
        "health": reading.health.value,
        "age_s": round(reading.age_s, 3),
        "held": reading.held,
        "problem": reading.problem,
        "status": None if reading.status is None else reading.status.model_dump(mode="json"),
    }


def _live(run: Path, reading: Reading) -> Reading:
    from rich.console import Console
    from rich.live import Live

    with Live(render(run, reading), console=Console(highlight=False), auto_refresh=False) as live:
        try:
            while reading.health is not Health.COMPLETE:
                time.sleep(REFRESH_S)
                reading = read_status(run)
                live.update(render(run, reading), refresh=True)
        except KeyboardInterrupt:  # how a live view is left
            pass
    return reading
