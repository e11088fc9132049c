"""GRPO: siblings are each other's baseline (Shao et al. 2024, "DeepSeekMath", section 4.1)."""

from __future__ import annotations

from rlhf.algorithms.base import penalised_scores, spread
from rlhf.algorithms.config import GrpoConfig
from rlhf.maths.advantages import ReduceSum, group_normalised
from rlhf.maths.packing import PackedBatch
from rlhf.objectives.base import TokenSignals
from rlhf.objectives.policy import PolicyObjective


class Grpo:
    """No critic: A = (score - mean of the group) / (std of the group), the same for every token of a completion."""

    needs_critic = False

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self.num_epochs, self.num_mini_batches = config.num_epochs, config.num_mini_batches
        self.needs_reference = max(config.policy.kl.coefficient, config.reward_kl.coefficient) > 0

    def policy_objective(self) -> PolicyObjective:
        """The clipped surrogate over groups that have at least two scores."""
        return PolicyObjective(self.config.policy, min_scores=2)

    def value_objective(self) -> None:
        """There is no critic."""

    def signals(self, batch: PackedBatch, raw: TokenSignals, reduce_sum: ReduceSum) -> TokenSignals:
        """Advantages from scores [N]; nothing is reduced over ranks, because groups are whole."""
        scores = penalised_scores(batch, raw, self.config.reward_kl, "algorithm grpo")
        advantages, usable = group_normalised(
            scores, batch.group_index, batch.num_groups, scale=self.config.scale_by_std
        )
        return spread(raw, batch, advantages, usable)
