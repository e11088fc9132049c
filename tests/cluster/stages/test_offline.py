"""At which temperature an offline stage learns."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.stages.offline import learning_temperature
from rlhf.config import validate

JUDGED = {"kind": "feedback"}
PEOPLE = {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}
REJECTION_SAMPLING = {"kind": "sft", "source": "feedback"}


@pytest.mark.parametrize(
    ("feedback", "stage", "expected"),
    [
        (JUDGED, REJECTION_SAMPLING, 0.7),
        (PEOPLE, REJECTION_SAMPLING, 1.0),
        (JUDGED, {**REJECTION_SAMPLING, "temperature": 0.9}, 0.9),
        (JUDGED, {"kind": "sft", "data": {"path": "records.jsonl"}}, 1.0),
        (JUDGED, {"kind": "reward"}, 1.0),
        (JUDGED, {"kind": "preference"}, 1.0),
    ],
)
def test_what_the_policy_drew_is_learned_at_the_temperature_it_was_drawn_at_unless_the_stage_says_otherwise(
    feedback: dict[str, Any], stage: dict[str, Any], expected: float
) -> None:
    document = {
        "name": "tiny",
        "model": "model",
        "sampling": {"temperature": 0.7},
        "data": {"train": {"path": "prompts.jsonl"}},
        "constitutions": {"training": "constitution.yaml"},
        "stages": [feedback, stage],
    }
    config = validate(RunConfig, document, "recipe.yaml")
    assert learning_temperature(config, config.stages[1]) == expected
