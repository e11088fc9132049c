"""How far two judges agree: on pairs within prompts, in the order of all texts, and on labels.

All functions leave out what is missing (None or NaN) on either side, and return how much was left to count.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.maths.rank_correlation import count_pairs, kendall_tau_b

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class PairAgreement:
    """Pairs of siblings that both judges put in an order.

    Attributes:
        agree: Pairs in the same order.
        differ: Pairs in opposite orders.
        tied: Pairs that at least one of them does not order.
    """

    agree: int
    differ: int
    tied: int

    @property
    def fraction(self) -> float | None:
        """Share of the pairs that both order on which they agree; None where there is no such pair."""
        both = self.agree + self.differ
        return self.agree / both if both else None

    def __add__(self, other: PairAgreement) -> PairAgreement:
        return PairAgreement(self.agree + other.agree, self.differ + other.differ, self.tied + other.tied)


def pair_agreement(first: Sequence[Values], second: Sequence[Values]) -> PairAgreement:
    """Counts pairs of siblings over all groups.

    Args:
        first: One judge's scores per group, higher is better. G lists [K]
        second: The other's, of the same siblings. G lists [K]
    """
    total = PairAgreement(0, 0, 0)
    for a, b in zip(first, second, strict=True):
        counts = count_pairs(a, b)
        tied = counts.tied_first + counts.tied_second + counts.tied_both
        total += PairAgreement(counts.concordant, counts.discordant, tied)
    return total


def mean_kendall(first: Sequence[Values], second: Sequence[Values]) -> tuple[float | None, int]:
    """Returns the mean over groups of Kendall's tau-b, and the number of groups that have one.

    A group on which either judge says the same of all siblings has no correlation and does not count.
    """
    taus = [tau for a, b in zip(first, second, strict=True) if (tau := kendall_tau_b(a, b)) is not None]
    return (sum(taus) / len(taus) if taus else None), len(taus)


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


def cohens_kappa(first: Sequence[Hashable | None], second: Sequence[Hashable | None]) -> float | None:
    """Cohen's kappa (1960): agreement on labels beyond what chance gives, (p_o - p_e) / (1 - p_e).

    Returns:
        At most 1; 0 is chance; None where nothing was labelled by both, or both gave one same label throughout.
    """
    if len(first) != len(second):
        raise ValueError(f"lists of {len(first)} and {len(second)} labels cannot be compared")
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not both:
        return None
    observed = sum(a == b for a, b in both) / len(both)
    labels = {label for pair in both for label in pair}
    expected = sum(
        sum(a == label for a, _ in both) * sum(b == label for _, b in both) / len(both) ** 2 for label in labels
    )
    return (observed - expected) / (1 - expected) if expected < 1 else None


def _known(value: float | None) -> bool:
    return value is not None and not np.isnan(value)


def _mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    ordered = np.sort(values)
    first, last = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (first + last - 1) / 2
