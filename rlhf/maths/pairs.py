"""Ordered pairs of siblings from rankings: the one place that says which pairs count.

Legend: N sequences, M pairs, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.maths.ops import group_sum


@dataclass(frozen=True, slots=True)
class OrderedPairs:
    """All pairs of siblings of which one is ranked strictly better.

    Attributes:
        better: Index of the better sequence. int64 [M]
        worse: Index of the worse sequence. int64 [M]
        share: 1 / pairs of the pair's group, so that shares sum to 1 in each group that has a pair. float32 [M]
        num_pairs: Pairs of each group. float32 [G]
    """

    better: Tensor
    worse: Tensor
    share: Tensor
    num_pairs: Tensor


def ordered_pairs(ranks: Tensor, group_index: Tensor, num_groups: int) -> OrderedPairs:
    """Lists the ordered pairs; ties and missing ranks give none.

    Args:
        ranks: Lower is better, NaN is missing. [N]
        group_index: int64 [N]
        num_groups: G.
    """
    # NaN compares false with everything, so missing ranks fall out here.
    wins = (group_index[:, None] == group_index[None, :]) & (ranks[:, None] < ranks[None, :])
    better, worse = wins.nonzero(as_tuple=True)
    groups = group_index[better]
    num_pairs = group_sum(torch.ones(len(groups), device=ranks.device), groups, num_groups)
    return OrderedPairs(better, worse, 1.0 / num_pairs[groups], num_pairs)


def count_ordered_pairs(ranks: Sequence[float]) -> int:
    """Number of ordered pairs in one group: ranks [K], NaN is missing."""
    present = [rank for rank in ranks if not math.isnan(rank)]
    return sum(first < second for first in present for second in present)
