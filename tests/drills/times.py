"""When something happened in a run, from its own records; seconds since the epoch."""

from __future__ import annotations

from pathlib import Path

from rlhf.runs.metrics import read_metrics
from tests.e2e import recipes


def event_after(run: Path, kind: str, moment: float) -> float:
    """The first event of a kind that was written after ``moment``."""
    return min(event["time"] for event in recipes.events(run, kind) if event["time"] >= moment)


def step_after(run: Path, stage: str, moment: float) -> float:
    """When a stage went on after ``moment``: its first step that was logged, or its end where no step was left."""
    found = [line["time"] for line in read_metrics(run / "metrics.jsonl", stage)]
    found += [event["time"] for event in recipes.events(run, "stage_completed") if event["stage"] == stage]
    return min(time for time in found if time >= moment - 0.001)  # they are rounded to milliseconds
