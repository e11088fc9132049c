"""Supervised fine-tuning on completions only. Legend: N sequences, T tokens."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.maths.aggregate import token_weights, weighted_sum
from rlhf.maths.packing import PackedBatch
from rlhf.objectives.base import (
    Denominators,
    Head,
    LossResult,
    ModelOutputs,
    TokenSignals,
    count_trained,
    required,
    token_metric,
    trained_mask,
)
from rlhf.objectives.config import SupervisedConfig
from rlhf.types import TrainGroup


class SupervisedObjective:
    """Negative log-likelihood of completion tokens under their loss masks; prompts give no loss."""

    head: Head = "language_model"
    needs_reference = False
    needs_entropy = False

    def __init__(self, config: SupervisedConfig) -> None:
        self.config = config

    def count(self, groups: Sequence[TrainGroup]) -> Denominators:
        """All trained tokens."""
        return count_trained(groups, [[True] * len(group.completion_ids) for group in groups])

    def loss(
        self, outputs: ModelOutputs, batch: PackedBatch, signals: TokenSignals, denominators: Denominators
    ) -> LossResult:
        """The loss of one micro-batch."""
        mask = trained_mask(batch, signals)
        log_probs = required(outputs.log_probs, "log_probs", "objective supervised")
        weights = token_weights(mask, batch.group_index, denominators, self.config.aggregation)
        return LossResult(weighted_sum(-log_probs, weights), {"nll": token_metric(-log_probs, mask)})
