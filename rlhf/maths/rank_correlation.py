"""How far two orders of the same items agree. A missing value is NaN (or None) and leaves its item out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import DataError

Values = Sequence[float | None] | NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Pairs of items by how two lists of values order them; pairs with a missing value are left out.

    Attributes:
        concordant: Both order the pair the same way.
        discordant: They order it in opposite ways.
        tied_first: Tied in the first list only.
        tied_second: Tied in the second list only.
        tied_both: Tied in both.
    """

    concordant: int
    discordant: int
    tied_first: int
    tied_second: int
    tied_both: int

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(
            self.concordant + other.concordant,
            self.discordant + other.discordant,
            self.tied_first + other.tied_first,
            self.tied_second + other.tied_second,
            self.tied_both + other.tied_both,
        )


def count_pairs(first: Values, second: Values) -> PairCounts:
    """Compares all pairs of items under two lists of values of the same length. [K], [K]."""
    a, b = _floats(first), _floats(second)
    if a.shape != b.shape:
        found = f"lists of {len(a)} and {len(b)} values"
        raise DataError("rank correlation", found=found, needed="two of one length", action="Compare the same items.")
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    above = np.triu_indices(len(a), 1)
    signs_a = np.sign(a[:, None] - a[None, :])[above]
    signs_b = np.sign(b[:, None] - b[None, :])[above]
    product = signs_a * signs_b
    return PairCounts(
        concordant=int((product > 0).sum()),
        discordant=int((product < 0).sum()),
        tied_first=int(((signs_a == 0) & (signs_b != 0)).sum()),
        tied_second=int(((signs_a != 0) & (signs_b == 0)).sum()),
        tied_both=int(((signs_a == 0) & (signs_b == 0)).sum()),
    )


def kendall_tau_b(first: Values, second: Values) -> float | None:
    """Kendall's tau-b (Kendall 1945): (C - D) / sqrt((C + D + ties in first) (C + D + ties in second)).

    Args:
        first: Higher is better. [K]
        second: In the same direction: negate ranks, of which lower is better. [K]

    Returns:
        -1 to 1, or None where a list is constant or fewer than two items are known: there is no correlation then.
    """
    counts = count_pairs(first, second)
    ordered = counts.concordant + counts.discordant
    product = (ordered + counts.tied_first) * (ordered + counts.tied_second)
    return None if product == 0 else (counts.concordant - counts.discordant) / float(np.sqrt(product))


def _floats(values: Values) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
