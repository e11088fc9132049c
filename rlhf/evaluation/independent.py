"""A scorer that had no part in training: VADER, a lexicon of sentiment (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import field_validator

from rlhf.config import StrictModel
from rlhf.errors import ConfigError


class IndependentScorerConfig(StrictModel):
    """What each request asks for in the scorer's terms."""

    request_signs: Mapping[str, int] = {"enthusiastic": 1, "scathing": -1}
    """Request (the slice) -> the sign of sentiment that follows it."""

    @field_validator("request_signs")
    @classmethod
    def _signs(cls, signs: Mapping[str, int]) -> Mapping[str, int]:
        if not signs or any(sign not in (1, -1) for sign in signs.values()):
            raise ValueError("at least one request, each with the sign 1 or -1")
        return signs


def _load_analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError(
            "evaluation: independent scorer",
            found="no package vaderSentiment",
            needed="vaderSentiment",
            action="Install it: pip install 'rlhf[quickstart]'.",
        ) from error
    return SentimentIntensityAnalyzer()


class VaderScorer:
    """Scores texts by VADER's compound sentiment.

    Raises:
        ConfigError: The package ``vaderSentiment`` is not installed.
    """

    def __init__(self) -> None:
        self._analyser = _load_analyser()

    def score(self, texts: Sequence[str]) -> list[float]:
        """Returns the compound score of each text, from -1 (scorn) to 1 (praise); an empty text gives 0."""
        return [float(self._analyser.polarity_scores(text)["compound"]) for text in texts]


def request_sign(request: str, signs: Mapping[str, int]) -> int:
    """The sign that follows a request; raises ``ConfigError`` for a request that the config does not know."""
    if request not in signs:
        raise ConfigError(
            "evaluation.request_signs",
            found=f"no sign for the request {request!r}",
            needed=f"one of {', '.join(sorted(signs))}",
            action="Add the request, or mend the prompts' field.",
        )
    return signs[request]


def follows_request(compound: float, request: str, signs: Mapping[str, int]) -> bool:
    """Whether the sentiment has the sign that was asked for; a neutral 0 does not follow any request."""
    return compound * request_sign(request, signs) > 0
