"""The clipped surrogate of a policy, with KL to a reference, entropy bonus and correction of the engine's mismatch.

Legend: N sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf.config import StrictModel
from rlhf.maths.aggregate import Aggregation, token_weights, weighted_sum
from rlhf.maths.ops import KlEstimator, kl_estimate
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
from rlhf.types import TrainGroup


class KlConfig(StrictModel):
    """A penalty on the distance from the reference."""

    coefficient: float = Field(default=0.0, ge=0.0)
    """How much a nat of KL per token costs; 0 turns the penalty off."""
    estimator: KlEstimator = "k3"
    """``k1``, ``k2`` or ``k3`` of Schulman (2020). In a loss k1 is weighted by the importance ratio, without which its
    expected gradient is zero."""


class PolicyConfig(StrictModel):
    """The policy's loss."""

    kind: Literal["policy"] = "policy"
    """Tag of this objective."""
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """The ratio is clipped above at 1 + clip_high; above clip_low leaves room for unlikely tokens (DAPO)."""
    importance_cap: float | None = Field(default=None, gt=0.0)
    """Weighs tokens by min(learner / generating engine, cap), which corrects for engines that compute slightly
    different or older log-probs. Absent: no correction."""
    entropy_coefficient: float = Field(default=0.0, ge=0.0)
    """Reward per nat of entropy, in the loss."""
    kl: KlConfig = KlConfig()
    """KL to the reference, in the loss."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses become one number."""
    fixed_length: int | None = Field(default=None, gt=0)
    """Tokens to divide by under ``aggregation: fixed_length``; usually the token limit of generation."""

    @model_validator(mode="after")
    def _fixed_length_belongs_to_its_aggregation(self) -> PolicyConfig:
        if (self.aggregation == "fixed_length") != (self.fixed_length is not None):
            raise ValueError("fixed_length goes with aggregation 'fixed_length', and only with it")
        return self


class PolicyObjective:
    """Clipped surrogate (PPO, Schulman et al. 2017, eq. 7), asymmetric clipping (DAPO, Yu et al. 2025, eq. 8).

    With r = exp(log p - log p_old) per token, w the truncated importance weight (held constant), A the advantage:
        loss = mean( w * max(-r A, -clip(r, 1 - low, 1 + high) A) + c_kl * KL - c_entropy * H )
        w = min(exp(log p_old - log p_engine), cap)   (truncated importance sampling, Ionides 2008)

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
