from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf.errors import DataError
from rlhf.maths.rank_correlation import count_pairs, kendall_tau_b


def test_full_agreement_and_full_disagreement():
    assert kendall_tau_b([1, 2, 3], [10, 20, 30]) == 1.0
    assert kendall_tau_b([1, 2, 3], [3, 2, 1]) == -1.0


def test_tau_b_with_ties_by_hand():
    # Pairs: (0,1) tied in a, (0,2) same way, (1,2) tied in b: C = 1, D = 0, one tie on each side.
    assert kendall_tau_b([1, 1, 2], [1, 2, 2]) == pytest.approx(1 / math.sqrt(2 * 2))


def test_tau_b_matches_its_definition_by_signs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, 9), rng.integers(0, 4, 9)
        signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in itertools.combinations(range(9), 2)]
        norm = math.sqrt(sum(x * x for x, _ in signs) * sum(y * y for _, y in signs))
        assert kendall_tau_b(a, b) == pytest.approx(sum(x * y for x, y in signs) / norm)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_missing_values_leave_their_item_out(missing):
    assert kendall_tau_b([1, missing, 3, 2], [1, 2, missing, 5]) == kendall_tau_b([1, 2], [1, 5])


@pytest.mark.parametrize(("first", "second"), [([], []), ([1], [2]), ([1, 1], [1, 2]), ([None, 1], [1, 2])])
def test_no_correlation_is_not_a_number(first, second):
    assert kendall_tau_b(first, second) is None


def test_lists_of_two_lengths_are_refused():
    with pytest.raises(DataError, match="lists of 2 and 3"):
        kendall_tau_b([1, 2], [1, 2, 3])


def test_counts_add():
    one, two = count_pairs([1, 2, 2], [1, 2, 3]), count_pairs([1, 1], [1, 1])
    assert (one + two).tied_both == 1 and (one + two).concordant == 2 and (one + two).tied_first == 1
