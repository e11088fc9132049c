"""Shapes of rewards: clipping, and a soft penalty for length."""

from __future__ import annotations


def clip(value: float, low: float, high: float) -> float:
    """Returns ``value`` held between ``low`` and ``high``."""
    return min(max(value, low), high)


def overlong_penalty(num_tokens: int, start: int, end: int) -> float:
    """Returns 0 up to ``start`` tokens, then falls evenly to -1 at ``end`` and stays there.

    The soft overlong punishment of DAPO (Yu et al., 2025, arXiv:2503.14476, equation 13), with the two bends given.

    Args:
        num_tokens: Tokens of the completion.
        start: Where the penalty begins.
        end: Where it is full; greater than ``start``.
    """
    return -clip((num_tokens - start) / (end - start), 0.0, 1.0)


def length_band(num_tokens: int, low: int, high: int, slack: int) -> float:
    """Returns 1 from ``low`` to ``high`` tokens, falling evenly to 0 at ``slack`` tokens outside (at once for 0)."""
    outside = max(low - num_tokens, num_tokens - high, 0)
    if outside == 0:
        return 1.0
    return max(0.0, 1.0 - outside / slack) if slack else 0.0
