"""PPO with a critic (Schulman et al. 2017; on language: Ziegler et al. 2019, Ouyang et al. 2022)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlhf.algorithms.base import needs_reference, reward_kl_tokens
from rlhf.algorithms.config import PpoConfig
from rlhf.maths.advantages import ReduceSum, generalised_advantages, whiten
from rlhf.maths.packing import PackedBatch
from rlhf.objectives.base import TokenSignals, required, usable_sequences
from rlhf.objectives.policy import PolicyObjective
from rlhf.objectives.value import ValueObjective


class Ppo:
    """Reward of a token: minus the cost of its KL, plus the score at the last token; advantages by GAE."""

    needs_critic = True

    def __init__(self, config: PpoConfig) -> None:
        self.config = config
        self.num_epochs, self.num_mini_batches = config.num_epochs, config.num_mini_batches
        self.needs_reference = needs_reference(config)
        self.shares_old_log_probs = config.reward_kl.coefficient > 0

    def policy_objective(self) -> PolicyObjective:
        """The clipped surrogate over sequences that have a score."""
        return PolicyObjective(self.config.policy, min_scores=1)

    def value_objective(self) -> ValueObjective:
        """The critic's clipped squared error."""
        return ValueObjective(self.config.value)

    def signals(self, batch: PackedBatch, raw: TokenSignals, reduce_sum: ReduceSum) -> TokenSignals:
        """Advantages and returns from scores [N] and old values [N, T], whitened over all ranks."""
        config = self.config
        scores = required(raw.scores, "scores", "algorithm ppo")
        values = required(raw.old_values, "old_values", "algorithm ppo")
        rewards = _at_last_token(scores, batch.length_mask) - reward_kl_tokens(
            batch, raw, config.reward_kl, "algorithm ppo"
        )
        usable = usable_sequences(scores, batch.group_index, min_scores=1)
        real = batch.length_mask & usable[:, None]
        advantages, returns = generalised_advantages(rewards, values, real, gamma=config.gamma, lam=config.lam)
        mask = batch.mask & real
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, reduce_sum)
        return replace(raw, advantages=advantages * mask, returns=returns, mask=mask)


def _at_last_token(scores: Tensor, length_mask: Tensor) -> Tensor:
    """Scores [N] at each sequence's last real token, 0 elsewhere. [N, T]."""
    places = torch.arange(length_mask.shape[1], device=length_mask.device)
    last = places[None, :] == length_mask.sum(-1, keepdim=True) - 1
    return torch.where(last, scores[:, None], 0.0)
