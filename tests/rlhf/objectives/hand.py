"""Small batches for hand-worked numbers."""

from __future__ import annotations

import numpy as np
import torch

from rlhf.maths.packing import PackedBatch, pack
from rlhf.objectives.base import Denominators, LossResult, ModelOutputs, Objective, TokenSignals
from rlhf.types import TrainGroup


def batch_of(*lengths: tuple[int, ...]) -> PackedBatch:
    """One group per tuple, one sibling per length."""
    groups = [
        TrainGroup(f"p{g}", np.array([1], np.int32), tuple(np.full(n, 2, np.int32) for n in row))
        for g, row in enumerate(lengths)
    ]
    return pack(groups, pad_id=0)


def counts_of(batch: PackedBatch) -> Denominators:
    return Denominators(float(batch.mask.sum()), float(batch.num_sequences), float(batch.num_groups))


def run(objective: Objective, batch: PackedBatch, outputs: ModelOutputs, **signals) -> LossResult:
    """The loss of a step that is this batch alone."""
    return objective.loss(outputs, batch, TokenSignals(**signals), counts_of(batch))


def means(result: LossResult) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in result.metrics.items()}


def logs(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows).log()
