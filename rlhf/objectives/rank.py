"""The reward model's loss on rankings of siblings. Legend: N sequences, M ordered pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlhf.maths.ops import group_sum
from rlhf.maths.packing import PackedBatch
from rlhf.maths.pairs import ordered_pairs
from rlhf.objectives.base import (
    Denominators,
    Head,
    LossResult,
    ModelOutputs,
    RankedObjective,
    TokenSignals,
    pair_metrics,
    required,
)
from rlhf.objectives.config import RankConfig


class RankObjective(RankedObjective):
    """Pairwise loss over all ordered pairs of siblings (InstructGPT, Ouyang et al. 2022, eq. 1).

    With d = r_better - r_worse - margin, mean over the pairs of a prompt and then over prompts of
        log_sigmoid: -log sigmoid(d)        sigmoid: -sigmoid(d)
    plus centring * mean over prompts of (mean score of the prompt's ranked siblings)^2. Ties and missing ranks give no
    pair, and a prompt without a pair counts nowhere.
    """

    head: Head = "scalar"
    needs_reference = False
    needs_entropy = False

    def __init__(self, config: RankConfig) -> None:
        self.config = config

    def loss(
        self, outputs: ModelOutputs, batch: PackedBatch, signals: TokenSignals, denominators: Denominators
    ) -> LossResult:
        """The loss of one micro-batch; ``signals.ranks`` must be set."""
        scores = required(outputs.sequence_scores, "sequence_scores", "objective rank")
        ranks = required(signals.ranks, "ranks", "objective rank")
        pairs = ordered_pairs(ranks, batch.group_index, batch.num_groups)
        gaps = scores[pairs.better] - scores[pairs.worse]
        shifted = gaps - self.config.margin
        per_pair = -F.logsigmoid(shifted) if self.config.variant == "log_sigmoid" else -torch.sigmoid(shifted)
        total = (per_pair * pairs.share).sum()
        here, paired = pairs.share.sum(), pairs.num_pairs > 0
        present = ~torch.isnan(ranks) & paired[batch.group_index]
        sums = group_sum(torch.where(present, scores, 0.0), batch.group_index, batch.num_groups)
        means = sums / group_sum(present.to(scores.dtype), batch.group_index, batch.num_groups).clamp(min=1)
        metrics = pair_metrics(gaps, pairs) | {
            "rank_loss": (total.detach(), here),
            "score": (means.detach().sum(), here),
        }
        loss = total + self.config.centring * means.square().sum()
        return LossResult(loss / max(denominators.groups, 1.0), metrics)
