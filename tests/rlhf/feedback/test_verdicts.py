"""Log-probs to verdicts: a failure never becomes a number."""

from __future__ import annotations

import math

import pytest

from rlhf.feedback.prompts import JudgeRequest
from rlhf.feedback.verdicts import PairOutcome, cache_key, make_verdict, pair_outcomes
from rlhf.types import Verdict

LABELS = (" positive", " negative")
REQUEST = JudgeRequest("u", (2,), "text", LABELS)
ANSWER = {" positive": math.log(0.6), " negative": math.log(0.2)}


def verdict(constitution, log_probs, **changes):
    settings = {"sign": 1.0, "centre": 0.0, "judge": "tiny"} | changes
    return make_verdict(constitution, REQUEST, log_probs, **settings)


def test_the_margin_is_centred_and_signed(make):
    assert verdict(make(), ANSWER).value == pytest.approx(math.log(3))
    assert verdict(make(), ANSWER, centre=1.0).value == pytest.approx(math.log(3) - 1)
    signed = verdict(make(), ANSWER, centre=1.0, sign=-1.0)
    assert signed.value == pytest.approx(1 - math.log(3))
    assert signed.samples == (2,)
    assert "centre 1.0000; sign -1" in signed.reason
    assert signed.judge.startswith("tiny under test@")


@pytest.mark.parametrize(
    ("log_probs", "words"),
    [
        (None, "no answer"),
        ({" positive": -1.0}, "no log-probability for label ' negative'"),
        ({" positive": -math.inf, " negative": -1.0}, "is -inf"),
        ({" positive": math.nan, " negative": -1.0}, "is nan"),
    ],
)
def test_a_failure_is_missing_with_its_reason(make, log_probs, words):
    missing = verdict(make(), log_probs)
    assert missing.value is None
    assert words in missing.error


def test_the_engines_own_error_is_kept(make):
    assert verdict(make(), None, error="timed out after 30 s").error == "timed out after 30 s"


@pytest.mark.parametrize(
    ("forward", "backward", "disagreement", "value"),
    [
        (2.0, -1.0, "tie", 1.0),
        (-2.0, 1.0, "none", 0.0),
        (2.0, 1.0, "tie", 0.5),  # always the first: says nothing
        (2.0, 1.0, "none", None),
        (0.0, 1.0, "tie", 0.5),
        (None, 1.0, "tie", None),
        (1.0, None, "tie", None),
    ],
)
def test_both_orders_make_one_outcome(forward, backward, disagreement, value):
    verdicts = [Verdict("u", (0, 1), forward, error="" if forward else "a"), Verdict("u", (1, 0), backward, error="b")]
    (outcome,) = pair_outcomes(verdicts, disagreement=disagreement)
    assert (outcome.samples, outcome.value) == ((0, 1), value)
    assert bool(outcome.error) == (value is None)


def test_one_order_is_not_enough_and_a_repeated_one_is_a_fault():
    assert pair_outcomes([Verdict("u", (1, 0), 1.0)], disagreement="tie") == [
        PairOutcome("u", (0, 1), None, "one order was not judged")
    ]
    with pytest.raises(ValueError, match="two verdicts"):
        pair_outcomes([Verdict("u", (1, 0), 1.0)] * 2, disagreement="tie")
    with pytest.raises(ValueError, match="not pairwise"):
        pair_outcomes([Verdict("u", (1,), 1.0)], disagreement="tie")


def test_a_cache_key_tells_every_part_apart(make):
    key = cache_key("judge", make(), "prompt", ["a", "b"])
    others = [
        cache_key("other", make(), "prompt", ["a", "b"]),
        cache_key("judge", make(centre=1.0), "prompt", ["a", "b"]),
        cache_key("judge", make(), "prompta", ["", "b"]),
        cache_key("judge", make(), "prompt", ["b", "a"]),
        cache_key("judge", make(), "prompt", ["ab"]),
    ]
    assert key == cache_key("judge", make(), "prompt", ["a", "b"])
    assert len({key, *others}) == 6
