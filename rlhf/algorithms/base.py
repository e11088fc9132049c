"""What an algorithm is to the loop: what it needs annotated, its signals, its objectives.

Legend: N sequences, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from rlhf.algorithms.config import AlgorithmSettings
from rlhf.maths.advantages import ReduceSum
from rlhf.maths.ops import kl_estimate, masked_sum
from rlhf.maths.packing import PackedBatch
from rlhf.objectives.base import TokenSignals, required
from rlhf.objectives.config import KlConfig
from rlhf.objectives.policy import PolicyObjective
from rlhf.objectives.value import ValueObjective


class Algorithm(Protocol):
    """One algorithm; stateless, so the driver and every rank may each build their own.

    Attributes:
        needs_reference: Whether groups need ``reference_log_probs``.
        needs_critic: Whether groups need ``values`` and a critic is trained.
        shares_old_log_probs: Whether groups need ``old_log_probs``, computed once by the policy before anything is
            trained: true where policy and critic both learn from a reward that the KL is part of.
        num_epochs: Times that a step trains on each of its rollouts.
        num_mini_batches: Optimizer updates in one epoch of a step.
    """

    needs_reference: bool
    needs_critic: bool
    shares_old_log_probs: bool
    num_epochs: int
    num_mini_batches: int

    def policy_objective(self) -> PolicyObjective:
        """The policy's loss."""
        ...

    def value_objective(self) -> ValueObjective | None:
        """The critic's loss; None where there is no critic."""
        ...

    def signals(self, batch: PackedBatch, raw: TokenSignals, reduce_sum: ReduceSum) -> TokenSignals:
        """Adds advantages (and returns) and the mask of usable sequences to the raw signals.

        Called once per step and rank with all of the rank's groups, before they are cut into micro-batches: whitening
        needs the whole step. Every rank calls it, as ``reduce_sum`` is a collective.

        Args:
            batch: All groups of this rank; only masks and indices are read.
            raw: ``scores``, and what the algorithm needs of old, behaviour and reference log-probs and old values.
            reduce_sum: Adds a tensor over ranks.
        """
        ...


def needs_reference(config: AlgorithmSettings) -> bool:
    """Whether a KL to the reference is paid, in the loss or in the reward."""
    return max(config.policy.kl.coefficient, config.reward_kl.coefficient) > 0


class SiblingAlgorithm(ABC):
    """What algorithms without a critic share: siblings are each other's baseline, and groups are whole on a rank."""

    needs_critic = False
    shares_old_log_probs = False

    def __init__(self, config: AlgorithmSettings) -> None:
        self._settings = config
        self.num_epochs, self.num_mini_batches = config.num_epochs, config.num_mini_batches
        self.needs_reference = needs_reference(config)

    @abstractmethod
    def advantages(self, scores: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Advantages [N] and which of them are usable, bool [N], from penalised scores [N]; NaN is missing."""

    def policy_objective(self) -> PolicyObjective:
        """The clipped surrogate over groups that have at least two scores."""
        return PolicyObjective(self._settings.policy, min_scores=2)

    def value_objective(self) -> None:
        """There is no critic."""
        return None

    def signals(self, batch: PackedBatch, raw: TokenSignals, reduce_sum: ReduceSum) -> TokenSignals:
        """Advantages from scores [N]; nothing is reduced over ranks, because groups are whole."""
        scores = penalised_scores(batch, raw, self._settings.reward_kl, f"algorithm {type(self).__name__.lower()}")
        advantages, usable = self.advantages(scores, batch)
        return spread(raw, batch, advantages, usable)


def reward_kl_tokens(batch: PackedBatch, raw: TokenSignals, config: KlConfig, where: str) -> Tensor:
    """The KL's cost per token, coefficient included, from the log-probs at the start of the step.

    These are the policy's own (``old_log_probs``) where it computed them, else the generating engine's. A reward has
    one KL, that of the policy which acted (Ziegler et al. 2019, eq. 2): where two models learn from it, both have to be
    given the same log-probs (``Algorithm.shares_old_log_probs``).

    Returns:
        float32 [N, T], 0 at padding, at tokens that the policy did not choose (loss mask), and everywhere when the
        coefficient is 0.
    """
    if config.coefficient == 0:
        return torch.zeros(batch.length_mask.shape, device=batch.length_mask.device)
    start = raw.behaviour_log_probs if raw.old_log_probs is None else raw.old_log_probs
    log_probs = required(start, "old_log_probs or behaviour_log_probs", where)
    reference = required(raw.reference_log_probs, "reference_log_probs", where)
    kl = kl_estimate(log_probs, reference, config.estimator)
    return torch.where(batch.mask, config.coefficient * kl, 0.0)


def penalised_scores(batch: PackedBatch, raw: TokenSignals, config: KlConfig, where: str) -> Tensor:
    """Scores less the KL's cost over the whole sequence: NaN stays NaN. [N]."""
    cost = masked_sum(reward_kl_tokens(batch, raw, config, where), batch.length_mask, -1)
    return required(raw.scores, "scores", where) - cost


def spread(raw: TokenSignals, batch: PackedBatch, advantages: Tensor, usable: Tensor) -> TokenSignals:
    """Gives every token its sequence's advantage.

    Args:
        raw: The signals to add to.
        batch: Gives T and the trained tokens.
        advantages: One per sequence. [N]
        usable: False leaves the whole sequence out of the loss. bool [N]
    """
    mask = batch.mask & usable[:, None]
    return replace(raw, advantages=advantages[:, None].expand(batch.mask.shape) * mask, mask=mask)
