"""The one reduction from per-token losses to a scalar that splits over micro-batches and ranks.

Every loss is sum(value * weight) with weights that already hold the global denominators, so the sum over all
micro-batches and ranks is the mean over the step. Legend: N sequences, T tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.maths.names import Aggregation
from rlhf.maths.ops import group_sum


class GlobalCounts(Protocol):
    """Counts over all ranks and micro-batches of one step (``rlhf.objectives.base.Denominators``)."""

    @property
    def tokens(self) -> float:
        """Trained tokens."""
        ...

    @property
    def sequences(self) -> float:
        """Sequences with a trained token."""
        ...

    @property
    def groups(self) -> float:
        """Groups with a trained token."""
        ...


def token_weights(
    mask: Tensor, group_index: Tensor, counts: GlobalCounts, how: Aggregation, fixed_length: int | None = None
) -> Tensor:
    """What each token weighs in the loss.

    token_mean     every token the same: 1 / tokens (DAPO, Yu et al. 2025, eq. 8)
    sequence_mean  every sequence the same: 1 / (its length * sequences) (GRPO, Shao et al. 2024, eq. 3)
    group_mean     every group the same: 1 / (tokens of the group * groups)
    fixed_length   no weight depends on a length: 1 / (fixed_length * sequences) (Dr. GRPO, Liu et al. 2025)

    Args:
        mask: Tokens that count; sequences and groups must be whole. bool [N, T]
        group_index: int64 [N]
        counts: Global counts.
        how: Which mean.
        fixed_length: For ``fixed_length``: the constant, for example the token limit of generation.

    Returns:
        float32 [N, T], 0 where the mask is False.

    Raises:
        ConfigError: ``fixed_length`` without a length.
    """
    lengths = mask.sum(-1)
    if how == "token_mean":
        per_sequence, count = torch.ones_like(lengths, dtype=torch.float32), counts.tokens
    elif how == "sequence_mean":
        per_sequence, count = 1.0 / lengths.clamp(min=1), counts.sequences
    elif how == "group_mean":
        totals = group_sum(lengths, group_index, int(group_index.max()) + 1)
        per_sequence = 1.0 / totals[group_index].clamp(min=1)
        count = counts.groups
    else:
        if fixed_length is None:
            needed = "a length to divide by"
            raise ConfigError("aggregation fixed_length", found="none", needed=needed, action="Set fixed_length.")
        per_sequence, count = torch.full(lengths.shape, 1.0 / fixed_length, device=mask.device), counts.sequences
    # A step whose every sequence is masked has nothing to divide by; its weights are all zero anyway.
    return mask * (per_sequence / max(count, 1.0))[:, None]


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum(values * weights) over any shape, with values ignored (NaN too) where the weight is 0."""
    return (torch.where(weights > 0, values, 0.0) * weights).sum()
