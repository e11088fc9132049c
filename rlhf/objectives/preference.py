"""Direct preference losses: a policy learns from rankings without a reward model. Legend: N sequences, T tokens."""

from __future__ import annotations

import torch.nn.functional as F

from rlhf.maths.ops import masked_sum
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
    trained_mask,
)
from rlhf.objectives.config import PreferenceConfig


class PreferenceObjective(RankedObjective):
    """DPO (Rafailov et al. 2023, eq. 7), smoothed labels (Mitchell 2023) and IPO (Azar et al. 2023, eq. 17).

    With h = (log pi - log ref)(better) - (log pi - log ref)(worse), over the trained tokens of a completion:
        dpo: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)        ipo: (h - 1 / (2 beta))^2
    Mean over the ordered pairs of a prompt, then over prompts, so that rankings of more than two serve as well.
    """

    head: Head = "language_model"
    needs_reference = True
    needs_entropy = False

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def loss(
        self, outputs: ModelOutputs, batch: PackedBatch, signals: TokenSignals, denominators: Denominators
    ) -> LossResult:
        """The loss of one micro-batch; ``signals.ranks`` and ``reference_log_probs`` must be set."""
        config, mask = self.config, trained_mask(batch, signals)
        log_probs = required(outputs.log_probs, "log_probs", "objective preference")
        reference = required(signals.reference_log_probs, "reference_log_probs", "objective preference")
        ranks = required(signals.ranks, "ranks", "objective preference")
        pairs = ordered_pairs(ranks, batch.group_index, batch.num_groups)
        gains = masked_sum(log_probs - reference, mask, -1)
        if config.length_normalised:
            gains = gains / mask.sum(-1).clamp(min=1)
        gaps = gains[pairs.better] - gains[pairs.worse]
        if config.variant == "dpo":
            smoothing = config.label_smoothing
            per_pair = -(1 - smoothing) * F.logsigmoid(config.beta * gaps) - smoothing * F.logsigmoid(
                -config.beta * gaps
            )
        else:
            per_pair = (gaps - 1 / (2 * config.beta)).square()
        total = (per_pair * pairs.share).sum()
        rewards, num_pairs = config.beta * gains.detach(), pairs.num_pairs.sum()
        metrics = pair_metrics(gaps, pairs, scale=config.beta) | {
            "preference_loss": (total.detach(), pairs.share.sum()),
            "better_reward": (rewards[pairs.better].sum(), num_pairs),
            "worse_reward": (rewards[pairs.worse].sum(), num_pairs),
        }
        return LossResult(total / max(denominators.groups, 1.0), metrics)
