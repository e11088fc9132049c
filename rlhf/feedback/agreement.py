"""How far two judges agree in the order of all texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float | None]
"""What one judge says of each text; None or NaN is missing, and its text is left out."""


def spearman(first: Values, second: Values) -> float | None:
    """Spearman's rank correlation (1904), ties sharing their mean rank.

    Returns:
        -1 to 1, or None where fewer than two items are known or a list is constant.
    """
    if len(first) != len(second):
        raise ValueError(f"lists of {len(first)} and {len(second)} values cannot be compared")
    both = [(a, b) for a, b in zip(first, second, strict=True) if _known(a) and _known(b)]
    if len(both) < 2:
        return None
    ranks = [_mean_ranks(np.array(column, dtype=np.float64)) for column in zip(*both, strict=True)]
    centred = [values - values.mean() for values in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else None


def _known(value: float | None) -> bool:
    return value is not None and not np.isnan(value)


def _mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    ordered = np.sort(values)
    first, last = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (first + last - 1) / 2
