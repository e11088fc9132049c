"""Agreement: hand-worked numbers, ties and missing values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import MissingFeedbackError
from rlhf.feedback.agreement import spearman
from rlhf.feedback.missing import check_missing


def test_spearman_by_hand():
    assert spearman([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]) == pytest.approx(0.8)
    # Ranks 0.5, 0.5, 2 against 0, 1, 2.
    assert spearman([1.0, 1.0, 5.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert spearman([1.0, None, 2.0], [3.0, 9.0, 4.0]) == pytest.approx(1.0)
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    assert spearman([1.0], [1.0]) is None
    with pytest.raises(ValueError, match="cannot be compared"):
        spearman([1.0], [1.0, 2.0])


@given(values=st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=12, unique=True))
def test_spearman_follows_order_only(values):
    assert spearman(values, [value**3 for value in values]) == pytest.approx(1.0)
    assert spearman(values, [-value for value in values]) == pytest.approx(-1.0)


def test_too_much_missing_feedback_stops():
    check_missing([], 0, 0.0, "judge")
    check_missing(["refused"], 10, 0.1, "judge")
    with pytest.raises(MissingFeedbackError) as caught:
        check_missing(["refused", "busy", "busy"], 10, 0.2, "scores of step 3")
    assert caught.value.where == "scores of step 3"
    assert "3 of 10 missing (30%), 2 of them because: busy" in str(caught.value)
    with pytest.raises(MissingFeedbackError, match="no reason given"):
        check_missing([""], 10, 0.0, "judge")
