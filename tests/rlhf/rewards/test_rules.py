"""Rules: one value each, weighted and added; what cannot be applied is missing."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter

from rlhf.config import StrictModel, validate
from rlhf.errors import ConfigError
from rlhf.rewards.rules import RuleConfig, apply_rule, apply_rules, score_group
from rlhf.types import Completion, Message, Prompt, Rollout, RolloutGroup

PROMPT = Prompt("u", (Message("user", "x"),), (1,), {"keywords": "telescop hill", "answer": "4.5 (a)", "blank": " "})


class Rules(StrictModel):
    rules: list[RuleConfig]


def rule(**settings):
    return TypeAdapter(RuleConfig).validate_python(settings)


def rollout(text="A film.", num_tokens=10, finish_reason="stop"):
    ids = np.zeros(num_tokens, np.int32)
    return Rollout(Completion(ids, np.zeros(num_tokens, np.float32), text, finish_reason, ()))


@pytest.mark.parametrize(
    ("settings", "completion", "value"),
    [
        ({"rule": "length", "min_tokens": 5, "max_tokens": 10}, rollout(num_tokens=10), 1.0),
        ({"rule": "length", "min_tokens": 5, "max_tokens": 10}, rollout(num_tokens=11), 0.0),
        ({"rule": "length", "min_tokens": 5, "max_tokens": 10, "slack": 4}, rollout(num_tokens=11), 0.75),
        ({"rule": "length", "min_tokens": 5, "max_tokens": 10, "slack": 4}, rollout(num_tokens=3), 0.5),
        ({"rule": "length", "min_tokens": 5, "max_tokens": 10, "slack": 4}, rollout(num_tokens=0), 0.0),
        ({"rule": "overlong", "start": 10, "end": 20}, rollout(num_tokens=10), 0.0),
        ({"rule": "overlong", "start": 10, "end": 20}, rollout(num_tokens=15), -0.5),
        ({"rule": "overlong", "start": 10, "end": 20}, rollout(num_tokens=99), -1.0),
        ({"rule": "contains", "field": "keywords"}, rollout("Two Telescopes!"), 1.0),
        ({"rule": "contains", "field": "keywords"}, rollout("An uphill biotelescope."), 0.0),
        ({"rule": "contains", "field": "keywords", "require": "all"}, rollout("A telescope."), 0.0),
        ({"rule": "contains", "field": "keywords", "require": "all"}, rollout("A telescope on a hill."), 1.0),
        ({"rule": "regex", "pattern": r"^Answer: {answer}$"}, rollout("So:\nAnswer: 4.5 (a)"), 1.0),
        ({"rule": "regex", "pattern": r"^Answer: {answer}$"}, rollout("So:\nAnswer: 495 (a)"), 0.0),
        ({"rule": "regex", "pattern": r"\d{2}"}, rollout("in 42 days"), 1.0),
        ({"rule": "repetition", "n": 2}, rollout("a b c d"), 0.0),
        ({"rule": "repetition", "n": 1}, rollout("so so so so"), -0.75),
        ({"rule": "non_empty"}, rollout(" \n"), 0.0),
        ({"rule": "non_empty"}, rollout("x"), 1.0),
        ({"rule": "finished"}, rollout(finish_reason="stop"), 1.0),
        ({"rule": "finished"}, rollout(finish_reason="length"), 0.0),
    ],
)
def test_each_rule(settings, completion, value):
    assert apply_rule(rule(**settings), PROMPT, completion) == pytest.approx(value)


def test_rules_add_up_with_their_weights():
    rules = [
        rule(rule="non_empty", weight=0.5),
        rule(rule="finished", weight=-2.0),
        rule(rule="finished", weight=1.0),
    ]
    score = apply_rules(rules, PROMPT, rollout())
    assert score.value == pytest.approx(-0.5)
    assert score.components == {"non_empty": 1.0, "finished": 1.0, "finished_2": 1.0}
    first, second = score_group(rules[:2], RolloutGroup(PROMPT, (rollout(), rollout(finish_reason="length"))))
    assert (first.value, second.value) == (-1.5, 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "contains", "field": "subject"},
        {"rule": "contains", "field": "blank"},
        {"rule": "regex", "pattern": "{subject}"},
    ],
)
def test_a_rule_without_its_field_gives_no_score(settings):
    score = apply_rules([rule(rule="non_empty"), rule(**settings)], PROMPT, rollout())
    assert score.value is None
    assert "prompt u has no field" in score.error
    assert score.components == {"non_empty": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "length", "min_tokens": 5, "max_tokens": 4},
        {"rule": "overlong", "start": 5, "end": 5},
        {"rule": "regex", "pattern": "("},
        {"rule": "magic"},
        {"rule": "finished", "weight": float("inf")},
        {"rule": "finished", "wieght": 1.0},
    ],
)
def test_impossible_rules_are_config_errors(settings):
    with pytest.raises(ConfigError):
        validate(Rules, {"rules": [settings]}, "config")
