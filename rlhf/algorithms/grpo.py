"""GRPO: siblings are each other's baseline (Shao et al. 2024, "DeepSeekMath", section 4.1)."""

from __future__ import annotations

from torch import Tensor

from rlhf.algorithms.base import SiblingAlgorithm
from rlhf.algorithms.config import GrpoConfig
from rlhf.maths.advantages import group_normalised
from rlhf.maths.packing import PackedBatch


class Grpo(SiblingAlgorithm):
    """A = (score - mean of the group) / (std of the group), the same for every token of a completion."""

    def __init__(self, config: GrpoConfig) -> None:
        super().__init__(config)
        self.config = config

    def advantages(self, scores: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """See ``group_normalised``."""
        return group_normalised(scores, batch.group_index, batch.num_groups, scale=self.config.scale_by_std)
