from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.feedback.constitution import ConstitutionConfig, build_constitution

POINTWISE = "{principles}\n=== case ===\nReview [{fence}]: {completion} [{fence}]\nSentiment:"
PAIRWISE = (
    "=== case ===\n[{fence}] {prompt} [{fence}]\nA [{fence}] {first} [{fence}]\nB [{fence}] {second} [{fence}]\nBetter:"
)


def settings(**changes):
    base = {
        "name": "test",
        "principles": "Praise is good.",
        "mode": "pointwise",
        "template": POINTWISE,
        "labels": {"positive": " positive", "negative": " negative"},
        "examples": [{"text": "I loved it.", "label": "positive"}, {"text": "I hated it.", "label": "negative"}],
        "sign": {"field": "request", "values": {"enthusiastic": 1, "scathing": -1}},
    }
    return base | changes


def pairwise_settings(**changes):
    base = {"mode": "pairwise", "template": PAIRWISE, "labels": {"positive": " A", "negative": " B"}, "examples": []}
    return settings(**(base | changes))


@pytest.fixture
def make():
    """Builds a constitution with some keys changed."""

    def build(**changes):
        kind = pairwise_settings if changes.get("mode") == "pairwise" else settings
        return build_constitution(ConstitutionConfig.model_validate(kind(**changes)), Path("/"), where="test")

    return build
