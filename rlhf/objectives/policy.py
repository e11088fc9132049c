"""The clipped surrogate of a policy, with KL to a reference, entropy bonus and correction of the engine's mismatch.

Legend: N sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.maths.aggregate import token_weights, weighted_sum
from rlhf.maths.ops import kl_estimate
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
from rlhf.objectives.config import PolicyConfig
from rlhf.types import TrainGroup


class PolicyObjective:
    """Clipped surrogate (PPO, Schulman et al. 2017, eq. 7), asymmetric clipping (DAPO, Yu et al. 2025, eq. 8).

    With r = exp(log p - log p_old) per token, w the truncated importance weight (held constant), A the advantage:
        loss = mean( w * max(-r A, -clip(r, 1 - low, 1 + high) A) + c_kl * KL - c_entropy * H )
        w = min(exp(log p_old - log p_engine), cap)   (truncated importance sampling, Ionides 2008)
    Where rollouts are stale p_old is of the weights at the start of the step, not of those that drew: r then limits how
    far one step goes and w alone corrects for the drift before it (the decoupled objective of Hilton et al. 2022,
    "Batch size-invariance for policy optimization").

    Args:
        config: The loss's settings.
        min_scores: Siblings of a group that need a score for the group to count: 2 where advantages compare siblings.
    """

    head: Head = "language_model"

    def __init__(self, config: PolicyConfig, *, min_scores: int = 1) -> None:
        self.config = config
        self.min_scores = min_scores
        self.needs_reference = config.kl.coefficient > 0
        self.needs_entropy = config.entropy_coefficient > 0

    def count(self, groups: Sequence[TrainGroup]) -> Denominators:
        """Trained tokens of sequences with a usable score."""
        return count_scored(groups, self.min_scores, "policy")

    def loss(
        self, outputs: ModelOutputs, batch: PackedBatch, signals: TokenSignals, denominators: Denominators
    ) -> LossResult:
        """The loss of one micro-batch; ``signals.advantages`` must be set."""
        config, mask = self.config, trained_mask(batch, signals)
        log_probs = required(outputs.log_probs, "log_probs", "objective policy")
        advantages = required(signals.advantages, "advantages", "objective policy")
        weights = token_weights(mask, batch.group_index, denominators, config.aggregation, config.fixed_length)
        old = log_probs.detach() if signals.old_log_probs is None else signals.old_log_probs
        ratio = torch.where(mask, log_probs - old, 0.0).exp()
        plain = -ratio * advantages
        clipped = -ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
        importance, metrics = self._importance(old, signals, mask)
        loss = weighted_sum(torch.maximum(plain, clipped) * importance, weights)
        metrics |= {
            "policy_loss": step_metric(loss, mask, denominators),
            # The clip acts only where it makes the objective smaller: there the gradient is cut off.
            "clip_fraction": token_metric((clipped > plain).to(ratio.dtype), mask),
            "ratio": token_metric(ratio, mask),
            "update_kl": token_metric(kl_estimate(old, log_probs, "k3"), mask),
            "nll": token_metric(-log_probs, mask),
        }
        if signals.reference_log_probs is not None or self.needs_reference:
            reference = required(signals.reference_log_probs, "reference_log_probs", "objective policy with kl")
            kl = kl_estimate(log_probs, reference, config.kl.estimator)
            metrics["kl"] = token_metric(kl, mask)
            if self.needs_reference:
                # d/dtheta of ratio * k1 is ratio * (k1 + 1) * dlog p, whose mean is the gradient of the KL.
                penalty = ratio * kl if config.kl.estimator == "k1" else kl
                loss = loss + config.kl.coefficient * weighted_sum(penalty, weights)
        if outputs.entropy is not None or self.needs_entropy:
            entropy = required(outputs.entropy, "entropy", "objective policy with entropy_coefficient")
            metrics["entropy"] = token_metric(entropy, mask)
            if self.needs_entropy:
                loss = loss - config.entropy_coefficient * weighted_sum(entropy, weights)
        return LossResult(loss, metrics)

    def _importance(
        self, old: Tensor, signals: TokenSignals, mask: Tensor
    ) -> tuple[Tensor | float, dict[str, tuple[Tensor, Tensor]]]:
        """The truncated importance weight (1 where it is off) and what it says of the generating engine."""
        cap = self.config.importance_cap
        if signals.behaviour_log_probs is None and cap is None:
            return 1.0, {}
        behaviour = required(signals.behaviour_log_probs, "behaviour_log_probs", "objective policy with importance_cap")
        mismatch = torch.where(mask, old - behaviour, 0.0).detach()
        ratio = mismatch.exp()
        metrics = {
            "behaviour_mismatch": token_metric(mismatch.abs(), mask),
            "behaviour_ratio": token_metric(ratio, mask),
        }
        if cap is None:
            return 1.0, metrics
        metrics["importance_capped"] = token_metric((ratio > cap).to(ratio.dtype), mask)
        return ratio.clamp(max=cap), metrics
