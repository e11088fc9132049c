"""Masked sums, log-probabilities and entropies from logits, and estimators of the KL divergence.

Legend: M tokens, V vocabulary. Values at masked places may be anything, NaN included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.maths.names import KlEstimator


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over True places of ``mask`` (same shape), along ``dim`` or over everything; 0 where there are none."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def group_sum(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """Sums values [N] by their group: [G], in the values' dtype."""
    return torch.zeros(num_groups, dtype=values.dtype, device=values.device).index_add(0, group_index, values)


class _RowSettings(NamedTuple):
    temperature: float
    chunk_size: int
    with_entropy: bool


class _TargetLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies of rows of logits, with their gradients, a chunk of rows at a time.

    Only the logits and one float per row are kept for the backward pass: a float32 copy of [M, V] never exists. With
    z = logits / temperature, p = softmax(z) and H the entropy,
        d log p[y] / d z = onehot(y) - p        d H / d z = -p * (log p + H)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, settings: _RowSettings) -> tuple[Tensor, Tensor]:
        temperature, chunk_size, with_entropy = settings
        wide = _compute_dtype(logits)
        log_probs = torch.empty(targets.shape, dtype=wide, device=logits.device)
        normalisers = torch.empty_like(log_probs)
        entropy = torch.zeros_like(log_probs)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            scaled = logits[rows].to(wide) / temperature
            normalisers[rows] = torch.logsumexp(scaled, -1)
            log_probs[rows] = scaled.gather(-1, targets[rows, None])[:, 0] - normalisers[rows]
            if with_entropy:
                entropy[rows] = _row_entropy(scaled - normalisers[rows, None])
        ctx.save_for_backward(logits, targets, normalisers, entropy)
        ctx.settings = settings
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, normalisers, entropy = ctx.saved_tensors
        temperature, chunk_size, with_entropy = ctx.settings
        gradient = torch.empty_like(logits)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            log_p = logits[rows].to(normalisers.dtype) / temperature - normalisers[rows, None]
            p = log_p.exp()
            below = p * -grad_log_probs[rows, None]
            if with_entropy:
                # log p may be -inf where logits were masked; p is 0 there and so is the product's limit.
                surprise = torch.where(p > 0, log_p, 0.0) + entropy[rows, None]
                below -= p * surprise * grad_entropy[rows, None]
            below.scatter_add_(-1, targets[rows, None], grad_log_probs[rows, None])
            gradient[rows] = below / temperature
        return gradient, None, None


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_entropy(log_p: Tensor) -> Tensor:
    """-sum p log p, where a forbidden token (log p = -inf) adds nothing."""
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)


def token_log_probs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = False, chunk_size: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of targets, and on request the entropies of their distributions, in float32.

    Args:
        logits: Any floating dtype; float64 is computed in float64. [M, V]
        targets: int64 [M]
        temperature: Logits are divided by it first, as the sampler did; greater than 0.
        with_entropy: Whether to compute entropies, with gradients.
        chunk_size: Rows whose float32 logits exist at the same time; few enough fit a core's cache.

    Returns:
        Log-probabilities [M], in nats, at most 0; entropies [M] in nats, or None.
    """
    log_probs, entropy = _TargetLogProbs.apply(logits, targets, _RowSettings(temperature, chunk_size, with_entropy))
    return log_probs, entropy if with_entropy else None


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy drew.

    With d = log policy - log reference (Schulman 2020, "Approximating KL divergence"):
        k1 = d                  unbiased, high variance, may be negative
        k2 = d^2 / 2            biased, low variance; its gradient estimates the KL's gradient
        k3 = exp(-d) - 1 + d    unbiased, low variance, never negative

    Args:
        log_probs: Of the policy. Any shape.
        reference_log_probs: Of the reference. Same shape.
        estimator: Which of the three.
    """
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference
