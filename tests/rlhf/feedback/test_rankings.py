"""Rankings: ties, missing verdicts, and what must not change them."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.feedback.rankings import (
    RankingConfig,
    num_ordered_pairs,
    ranking_from_outcomes,
    ranking_from_scores,
    ranking_from_verdicts,
    ranks_as_floats,
)
from rlhf.feedback.verdicts import PairOutcome
from rlhf.types import Ranking, Verdict

SCORES = st.lists(st.none() | st.integers(-5, 5).map(float), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("scores", "tie_width", "ranks"),
    [
        ([0.1, 2.0, -1.0], 0.0, (2, 1, 3)),
        ([1.0, 2.0, 1.0, None], 0.0, (2, 1, 2, None)),
        ([1.0, math.nan], 0.0, (1, None)),
        ([0.0, 0.9, 1.8], 1.0, (2, 1, 1)),  # a rank is never wider than the tie width
        ([None, None], 0.0, (None, None)),
    ],
)
def test_scores_become_ranks(scores, tie_width, ranks):
    assert ranking_from_scores("u", scores, tie_width=tie_width).ranks == ranks


@given(scores=SCORES, width=st.sampled_from([0.0, 1.0, 2.5]), shift=st.integers(-3, 3), data=st.data())
def test_ranks_follow_the_siblings_and_ignore_a_shift(scores, width, shift, data):
    ranks = ranking_from_scores("u", scores, tie_width=width).ranks
    moved = [None if score is None else score + shift for score in scores]
    assert ranking_from_scores("u", moved, tie_width=width).ranks == ranks
    order = data.draw(st.permutations(range(len(scores))))
    mixed = ranking_from_scores("u", [scores[i] for i in order], tie_width=width).ranks
    assert mixed == tuple(ranks[i] for i in order)
    for a, b in permutations(range(len(scores)), 2):
        if scores[a] is not None and scores[b] is not None and scores[a] > scores[b] + width:
            assert ranks[a] < ranks[b]


def outcomes_from(scores):
    return [
        PairOutcome(
            "u",
            (a, b),
            None if None in (scores[a], scores[b]) else 0.5 + (scores[a] > scores[b]) / 2 - (scores[a] < scores[b]) / 2,
        )
        for a, b in combinations(range(len(scores)), 2)
    ]


@given(scores=st.lists(st.integers(-3, 3), min_size=2, max_size=6))
def test_complete_outcomes_of_an_order_give_that_order(scores):
    ranking = ranking_from_outcomes("u", len(scores), outcomes_from(scores), source="judge")
    assert ranking.ranks == ranking_from_scores("u", [float(score) for score in scores]).ranks


def test_a_cycle_is_a_tie_and_a_missing_outcome_is_not_a_loss():
    cycle = [PairOutcome("u", (0, 1), 1.0), PairOutcome("u", (1, 2), 1.0), PairOutcome("u", (0, 2), 0.0)]
    assert ranking_from_outcomes("u", 3, cycle, source="judge").ranks == (1, 1, 1)
    partly = [PairOutcome("u", (0, 1), 1.0), PairOutcome("u", (0, 2), None, "x"), PairOutcome("u", (1, 2), None, "x")]
    assert ranking_from_outcomes("u", 3, partly, source="judge").ranks == (1, 2, None)


def test_verdicts_of_both_kinds_become_rankings():
    config = RankingConfig(tie_width=0.5)
    pointwise = [Verdict("u", (1,), 1.0), Verdict("u", (0,), 0.7), Verdict("u", (2,), None, error="x")]
    assert ranking_from_verdicts("u", 4, pointwise, config) == Ranking("u", (1, 1, None, None), "judge")
    pairwise = [Verdict("u", (0, 1), -1.0), Verdict("u", (1, 0), 2.0)]
    assert ranking_from_verdicts("u", 2, pairwise, config, source="b").ranks == (2, 1)
    disagree = [Verdict("u", (0, 1), 1.0), Verdict("u", (1, 0), 2.0)]
    assert ranking_from_verdicts("u", 2, disagree, config).ranks == (1, 1)
    assert ranking_from_verdicts("u", 2, disagree, RankingConfig(disagreement="none")).ranks == (None, None)
    with pytest.raises(ValueError, match="siblings at once"):
        ranking_from_verdicts("u", 2, [*pointwise, *pairwise], config)
    with pytest.raises(ValueError, match="another prompt"):
        ranking_from_verdicts("v", 2, pairwise, config)


def test_ranks_for_the_loss():
    ranking = Ranking("u", (2, 1, None, 2))
    floats = ranks_as_floats(ranking)
    assert floats[:2] == (2.0, 1.0) and math.isnan(floats[2])
    assert num_ordered_pairs(ranking) == 2
    assert num_ordered_pairs(Ranking("u", (1, 1, None))) == 0
