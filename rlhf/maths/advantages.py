"""Advantages and returns from scores and values.

A missing score is NaN: it takes part in no statistic, and its own advantage is 0 under a False mask.
Legend: N sequences (siblings of all groups), T tokens, right-padded, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.maths.ops import group_sum, masked_sum

ReduceSum = Callable[[Tensor], Tensor]
"""Adds a tensor over all ranks and returns the sum; the identity on one rank."""


def group_normalised(
    scores: Tensor, group_index: Tensor, num_groups: int, *, scale: bool = True, epsilon: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Scores less their group's mean, over its standard deviation (GRPO, Shao et al. 2024, section 4.1.2).

    A = (r - mean) / (std + epsilon), with the sample standard deviation (n - 1); without ``scale`` A = r - mean, which
    does not favour prompts whose answers score alike (Dr. GRPO, Liu et al. 2025). Groups with fewer than two scores
    have no advantage.

    Args:
        scores: NaN is missing. [N]
        group_index: int64 [N]
        num_groups: G.
        scale: Whether to divide by the standard deviation.
        epsilon: Keeps the division finite where all scores of a group are equal.

    Returns:
        Advantages [N] (0 where unusable) and which of them are usable, bool [N].
    """
    present = ~torch.isnan(scores)
    known = torch.where(present, scores, 0.0)
    counts = group_sum(present.to(scores.dtype), group_index, num_groups)
    means = group_sum(known, group_index, num_groups) / counts.clamp(min=1)
    centred = torch.where(present, scores - means[group_index], 0.0)
    usable = present & (counts >= 2)[group_index]
    if scale:
        variances = group_sum(centred.square(), group_index, num_groups) / (counts - 1).clamp(min=1)
        centred = centred / (variances.sqrt() + epsilon)[group_index]
    return torch.where(usable, centred, 0.0), usable


def leave_one_out(scores: Tensor, group_index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Each score less the mean of its siblings' scores (RLOO, Kool et al. 2019; Ahmadian et al. 2024, eq. 8).

    A_i = r_i - sum of the other n - 1 scores / (n - 1) = (r_i - mean) * n / (n - 1). Groups with fewer than two scores
    have no advantage. Arguments and returns as in ``group_normalised``.
    """
    centred, usable = group_normalised(scores, group_index, num_groups, scale=False)
    counts = group_sum((~torch.isnan(scores)).to(scores.dtype), group_index, num_groups)
    return centred * (counts / (counts - 1).clamp(min=1))[group_index], usable


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2016, eq. 16) on right-padded sequences that end at their last token.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, with V and A zero after the end.

    Args:
        rewards: Reward for emitting token t. [N, T]
        values: Value of the state before token t. [N, T]
        mask: Real tokens; each row is True up to its length. bool [N, T]
        gamma: Discount per token, 0 to 1.
        lam: Weight of longer returns, 0 to 1.

    Returns:
        Advantages and returns (advantages + values), both [N, T] and 0 at padding.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # At padding rewards and values are zero, so both carried terms stay zero until the last real token.
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, reduce_sum: ReduceSum, *, epsilon: float = 1e-8) -> Tensor:
    """Shifts and scales to mean 0 and sample variance 1 over the True places of all ranks.

    Two reductions (mean, then squares around it) rather than one, so that a large mean does not cancel the variance.

    Args:
        values: Any shape.
        mask: Same shape.
        reduce_sum: Adds over ranks; every rank must call this function.
        epsilon: Added to the variance.

    Returns:
        Same shape, 0 where the mask is False.
    """
    local = torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)])
    total, count = reduce_sum(local).unbind()
    centred = torch.where(mask, values - total / count.clamp(min=1), 0.0)
    variance = reduce_sum(centred.square().sum()[None])[0] / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + epsilon)
