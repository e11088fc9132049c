"""Metrics of one call of a learner, summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from actors.deepspeed.engine import StepResult
from actors.ranks import ProcessGroup


class StepTotals:
    """Metrics of one call: what objectives count, and what the optimizer did."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._steps: list[StepResult] = []

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds one micro-batch's totals and counts."""
        for name, (total, count) in metrics.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + float(total), before[1] + float(count))

    def add_step(self, result: StepResult) -> None:
        """Adds what one optimizer step did."""
        self._steps.append(result)

    def reduced(self, group: ProcessGroup) -> dict[str, float]:
        """Total / count over ranks; a metric that nothing was counted for is left out."""
        names = sorted(set(group.gather_names(list(self._sums))))
        flat = group.sum_floats([x for name in names for x in self._sums.get(name, (0.0, 0.0))])
        metrics = {
            name: total / count for name, total, count in zip(names, flat[::2], flat[1::2], strict=True) if count
        }
        if self._steps:
            norms = [step.grad_norm for step in self._steps if not step.skipped]
            metrics["lr"] = self._steps[-1].lr
            metrics["skipped"] = float(sum(step.skipped for step in self._steps))
            metrics["consecutive_skips"] = float(self._steps[-1].consecutive_skips)
            if norms:
                metrics["grad_norm"] = sum(norms) / len(norms)
        return metrics
