"""The critic's loss. Legend: N sequences, T tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.maths.aggregate import token_weights, weighted_sum
from rlhf.maths.packing import PackedBatch
from rlhf.objectives.base import (
    Denominators,
    Head,
    LossResult,
    ModelOutputs,
    TokenSignals,
    count_scored,
    required,
    step_metric,
    token_metric,
    trained_mask,
)
from rlhf.objectives.config import ValueConfig
from rlhf.types import TrainGroup


class ValueObjective:
    """Half the squared error against returns, clipped around the old values (Engstrom et al. 2020, section 3).

    loss = mean over tokens of max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2
    """

    head: Head = "scalar"
    needs_reference = False
    needs_entropy = False

    def __init__(self, config: ValueConfig) -> None:
        self.config = config

    def count(self, groups: Sequence[TrainGroup]) -> Denominators:
        """Trained tokens of sequences with a score."""
        return count_scored(groups, 1, "value")

    def loss(
        self, outputs: ModelOutputs, batch: PackedBatch, signals: TokenSignals, denominators: Denominators
    ) -> LossResult:
        """The loss of one micro-batch; ``signals.returns`` must be set, and ``old_values`` with a clip."""
        mask, clip = trained_mask(batch, signals), self.config.clip
        values = required(outputs.token_values, "token_values", "objective value")
        returns = required(signals.returns, "returns", "objective value")
        error = (values - returns).square()
        metrics = {
            "value_error": token_metric(error, mask),
            "value": token_metric(values, mask),
            "return": token_metric(returns, mask),
        }
        if clip is not None:
            old = required(signals.old_values, "old_values", "objective value with clip")
            clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
            metrics["value_clip_fraction"] = token_metric((clipped > error).to(error.dtype), mask)
            error = torch.maximum(error, clipped)
        loss = weighted_sum(error / 2, token_weights(mask, batch.group_index, denominators, "token_mean"))
        return LossResult(loss, metrics | {"value_loss": step_metric(loss, mask, denominators)})
