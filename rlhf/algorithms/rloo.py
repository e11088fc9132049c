"""RLOO: REINFORCE with the siblings' mean as baseline (Ahmadian et al. 2024, "Back to Basics", section 3.3)."""

from __future__ import annotations

from rlhf.algorithms.base import penalised_scores, spread
from rlhf.algorithms.config import RlooConfig
from rlhf.maths.advantages import ReduceSum, leave_one_out
from rlhf.maths.packing import PackedBatch
from rlhf.objectives.base import TokenSignals
from rlhf.objectives.policy import PolicyObjective


class Rloo:
    """No critic: A_i = score_i - mean of the other siblings' scores, an unbiased baseline."""

    needs_critic = False

    def __init__(self, config: RlooConfig) -> None:
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
        scores = penalised_scores(batch, raw, self.config.reward_kl, "algorithm rloo")
        advantages, usable = leave_one_out(scores, batch.group_index, batch.num_groups)
        return spread(raw, batch, advantages, usable)
