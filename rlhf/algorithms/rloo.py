"""RLOO: REINFORCE with the siblings' mean as baseline (Ahmadian et al. 2024, "Back to Basics", section 3.3)."""

from __future__ import annotations

from torch import Tensor

from rlhf.algorithms.base import SiblingAlgorithm
from rlhf.maths.advantages import leave_one_out
from rlhf.maths.packing import PackedBatch


class Rloo(SiblingAlgorithm):
    """A_i = score_i - mean of the other siblings' scores, an unbiased baseline."""

    def advantages(self, scores: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """See ``leave_one_out``."""
        return leave_one_out(scores, batch.group_index, batch.num_groups)
