"""Intervals, text measures, win rate, slices and reward-model measures against hand numbers."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.bootstrap import (
    BootstrapConfig,
    Interval,
    jackknife_interval,
    mean_interval,
    paired_difference,
    ratio_interval,
)
from rlhf.evaluation.independent import IndependentScorerConfig, VaderScorer, follows_request
from rlhf.evaluation.reward_model import (
    kendall_tau,
    pair_accuracy,
    pair_outcomes,
    ranks_from_scores,
)
from rlhf.evaluation.slices import by_slice, worst_slice
from rlhf.evaluation.text import distinct_n, distinct_n_left_out, on_topic, repetition, subject_stems, word_count
from rlhf.evaluation.win_rate import win_rate

CONFIG = BootstrapConfig(num_resamples=2000)

# Intervals


def test_interval_has_the_width_of_the_normal_theory() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = mean_interval(values, list(range(400)), CONFIG)
    assert interval.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)


def test_same_seed_same_interval_other_seed_other_interval() -> None:
    values, clusters = [1.0, 2.0, 5.0, 9.0], ["a", "b", "c", "d"]
    assert mean_interval(values, clusters, CONFIG) == mean_interval(values, clusters, CONFIG)
    other = BootstrapConfig(num_resamples=2000, seed=1)
    assert mean_interval(values * 5, list(range(20)), CONFIG) != mean_interval(values * 5, list(range(20)), other)


def test_copies_inside_a_cluster_add_no_certainty() -> None:
    values = [0.0, 1.0] * 10
    once = mean_interval(values, list(range(20)), CONFIG)
    copied = mean_interval([v for v in values for _ in range(10)], [c for c in range(20) for _ in range(10)], CONFIG)
    assert copied == once


def test_coverage_of_the_clustered_interval() -> None:
    """Of 200 samples with strong within-prompt correlation about 95 % of the intervals hold the true mean of 0."""
    rng, covered = np.random.default_rng(0), 0
    config = BootstrapConfig(num_resamples=400)
    clusters = [c for c in range(60) for _ in range(2)]
    for _ in range(200):
        values = np.repeat(rng.normal(size=60), 2) + 0.1 * rng.normal(size=120)
        interval = mean_interval(values, clusters, config)
        covered += interval.low <= 0.0 <= interval.high
    assert 0.90 <= covered / 200 <= 0.985


def test_pairing_takes_the_prompts_spread_out() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0.0, 5.0, size=100)
    before, after = difficulty + rng.normal(0, 0.1, 100), difficulty + 0.5 + rng.normal(0, 0.1, 100)
    clusters = [f"p{i}" for i in range(100)]
    interval = paired_difference((after, clusters), (before, clusters), CONFIG)
    assert interval.mean == pytest.approx(after.mean() - before.mean())
    assert 0.45 < interval.low < interval.high < 0.55


def test_pairing_uses_shared_prompts_only() -> None:
    interval = paired_difference(([1.0, 5.0], ["a", "b"]), ([0.0, 100.0], ["a", "c"]), CONFIG)
    assert interval == Interval(mean=1.0, low=1.0, high=1.0)
    with pytest.raises(DataError, match="no values"):
        paired_difference(([1.0], ["a"]), ([1.0], ["b"]), CONFIG)


def test_ratio_weighs_by_the_denominator() -> None:
    interval = ratio_interval([10.0, 0.0], [10.0, 90.0], ["a", "a"], CONFIG)
    assert interval == Interval(mean=0.1, low=0.1, high=0.1)
    with pytest.raises(DataError, match="none above 0"):
        ratio_interval([1.0], [0.0], ["a"], CONFIG)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_missing_values_are_never_averaged(values: list[float]) -> None:
    with pytest.raises(DataError):
        mean_interval(values, list(range(len(values))), CONFIG)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(size=50)
    left_out = [(values.sum() - v) / 49 for v in values]
    interval = jackknife_interval(float(values.mean()), left_out, CONFIG)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.959964 * values.std(ddof=1) / math.sqrt(50))
    assert jackknife_interval(0.5, [0.0], CONFIG) == Interval(mean=0.5, low=0.5, high=0.5)


# Texts


def test_distinct_2_by_hand() -> None:
    texts = ["a b c", "a b d", "", "one"]
    assert distinct_n(texts) == 3 / 4  # ab bc ab bd
    assert distinct_n(["", "word"]) == 0.0
    assert distinct_n(["Great! great GREAT"], 1) == 1 / 3


def test_distinct_left_out_equals_doing_it_again() -> None:
    texts = ["a b c a b", "b c d", "a b", "", "x y x y"]
    expected = [distinct_n(texts[:i] + texts[i + 1 :]) for i in range(len(texts))]
    assert distinct_n_left_out(texts, range(len(texts))) == pytest.approx(expected)
    without = [distinct_n(texts[2:]), distinct_n([texts[0], texts[1]])]
    assert distinct_n_left_out(texts, [0, 0] + [1] * (len(texts) - 2)) == pytest.approx(without)


def test_repetition_and_words() -> None:
    assert repetition("great " * 16) == pytest.approx(13 / 14)
    assert repetition("every word here is new") == 0.0
    assert repetition("") == 0.0
    assert word_count("It's a well-made film.") == 5


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("The heists were dull.", "a heist", True),
        ("Two pirates and a map", "a pirate", True),
        ("These stories drag on.", "a love story", True),
        ("A lighthouse, alone.", "the keeper of a lighthouse", True),
        ("A wonderful film with great acting", "a heist", False),
        ("The of and a", "the a", False),
        ("", "a heist", False),
        ("the seaside is nice", "the sea", False),
    ],
)
def test_on_topic(text: str, subject: str, expected: bool) -> None:
    assert on_topic(text, subject) is expected


def test_keywords_are_stems_that_a_word_begins_with() -> None:
    assert on_topic("The cartoonists draw.", "a film", "cartoon dictator")
    assert not on_topic("A film about something", "a film", "cartoon dictator")


def test_subject_stems_leave_function_words_out() -> None:
    assert subject_stems("a cook in the war") == ("cook", "war")


# Independent scorer


def test_vader_sign_against_the_request() -> None:
    signs = IndependentScorerConfig().request_signs
    praise, scorn, nothing, empty = VaderScorer().score(
        ["I loved this wonderful film.", "An awful, boring disaster.", "The film is about a heist.", ""]
    )
    assert follows_request(praise, "enthusiastic", signs) and not follows_request(praise, "scathing", signs)
    assert follows_request(scorn, "scathing", signs) and not follows_request(scorn, "enthusiastic", signs)
    assert nothing == empty == 0.0
    assert not follows_request(nothing, "scathing", signs) and not follows_request(nothing, "enthusiastic", signs)
    with pytest.raises(ConfigError, match="no sign for the request 'polite'"):
        follows_request(1.0, "polite", signs)


def test_a_missing_package_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.startswith("vaderSentiment"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="no package vaderSentiment"):
        VaderScorer()


@pytest.mark.parametrize("signs", [{}, {"scathing": 0}])
def test_signs_are_checked(signs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="sign 1 or -1"):
        IndependentScorerConfig(request_signs=signs)


# Win rate and slices


def test_win_rate_counts_every_pair_and_half_a_tie() -> None:
    after, before = {"a": [1.0, 3.0], "b": [0.0]}, {"a": [2.0, 0.0], "b": [0.0], "c": [9.0]}
    interval = win_rate(after, before, CONFIG)
    assert interval.mean == pytest.approx((0 + 1 + 1 + 1 + 0.5) / 5)
    assert win_rate({"a": [1.0]}, {"a": [0.9]}, CONFIG, tie_margin=0.2).mean == 0.5
    with pytest.raises(DataError, match="no pair"):
        win_rate({"a": [1.0]}, {"b": [1.0]}, CONFIG)


def test_a_model_against_itself_wins_half() -> None:
    margins = {f"p{i}": list(np.random.default_rng(i).normal(size=3)) for i in range(50)}
    assert win_rate(margins, margins, CONFIG).mean == 0.5


def test_worst_slice_is_named() -> None:
    assert list(by_slice(["bb", "a", "cc"], key=lambda row: str(len(row)))) == ["1", "2"]
    intervals = {name: Interval(mean=m, low=m, high=m) for name, m in [("x", 0.4), ("y", 0.2), ("z", 0.2)]}
    assert worst_slice(intervals) == "y"
    assert worst_slice(intervals, higher_is_better=False) == "x"
    with pytest.raises(ValueError):
        worst_slice({})


# Reward model


def test_pair_outcomes_leave_ties_and_gaps_out() -> None:
    assert pair_outcomes([3.0, 1.0, 2.0, 0.0], [1, 2, 2, None]) == [1.0, 1.0]
    assert pair_outcomes([1.0, 1.0], [1, 2]) == [0.5]
    assert pair_outcomes([None, 1.0], [1, 2]) == []
    assert pair_outcomes([0.0, 1.0], [1, 2]) == [0.0]
    with pytest.raises(ValueError):
        pair_outcomes([1.0], [1, 2])


def test_pair_accuracy_over_all_pairs() -> None:
    interval = pair_accuracy([[3.0, 2.0, 1.0], [0.0, 1.0]], [[1, 2, 3], [1, 2]], CONFIG)
    assert interval.mean == pytest.approx(3 / 4)
    with pytest.raises(DataError, match="no comparable pair"):
        pair_accuracy([[1.0, 2.0]], [[1, 1]], CONFIG)


def test_ranks_from_scores() -> None:
    assert ranks_from_scores([0.5, None, 2.0, 0.5, float("nan")]) == (2, None, 1, 2, None)


def test_kendall_tau_averages_over_prompts() -> None:
    interval = kendall_tau([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]], [[1, 2], [1, 2], [1, 2]], CONFIG)
    assert interval.mean == 0.0
    with pytest.raises(DataError):
        kendall_tau([[1.0, 1.0]], [[1, 2]], CONFIG)
