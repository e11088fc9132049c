"""Metrics of every step: ``metrics.jsonl`` for programs, TensorBoard for eyes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.runs.files import append_json_line, keep_json_lines, read_json_lines

TIMING_KEYS = ("time", "wall_seconds")
"""Keys of a line that differ between two equal runs; metric names that end in ``seconds`` or ``per_second`` do too."""


class MetricsLogger:
    """Writes one line per call: ``{"stage", "step", "time", "wall_seconds", "metrics", "non_finite"}``.

    A number that is not finite is written as null and counted in ``non_finite``: strict JSON has no NaN, and a reader
    must not take a gap for a value.

    Args:
        path: The file, usually ``RUN/metrics.jsonl``.
        tensorboard: Folder for TensorBoard's files, one sub-folder per stage; None writes none.
    """

    def __init__(self, path: Path, *, tensorboard: Path | None = None) -> None:
        self.path = path
        self._tensorboard = tensorboard
        self._writers: dict[str, Any] = {}
        self._purge_from: dict[str, int] = {}
        self._started = time.monotonic()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the scalars of one step of one stage."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line: dict[str, Any] = {
            "stage": stage,
            "step": step,
            "time": round(time.time(), 3),
            "wall_seconds": round(time.monotonic() - self._started, 3),
            "non_finite": len(metrics) - len(finite),
            "metrics": {name: finite.get(name) for name in metrics},
        }
        append_json_line(self.path, line)
        if self._tensorboard is not None:
            writer = self._writer(stage, step)
            for name, value in finite.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def resume(self, stage: str, step: int) -> int:
        """Drops the lines of a stage after the step that it resumes from; returns how many were dropped.

        Steps after the checkpoint are done again, so their first lines belong to weights that are gone.
        """
        self._purge_from[stage] = step + 1
        return keep_json_lines(self.path, lambda line: line.get("stage") != stage or line.get("step", 0) <= step)

    def close(self) -> None:
        """Flushes and closes TensorBoard's files; may be called twice."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, stage: str, step: int) -> Any:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self._tensorboard / stage) if self._tensorboard else None
            self._writers[stage] = SummaryWriter(folder, purge_step=self._purge_from.get(stage, step))
        return self._writers[stage]


def read_metrics(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file, of one stage or of all."""
    return [line for line in read_json_lines(path) if stage is None or line.get("stage") == stage]
