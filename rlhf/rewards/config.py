"""The parts of a reward: what is asked, and how much it counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from rlhf.config import StrictModel
from rlhf.rewards.rules import RuleConfig


class _Part(StrictModel):
    weight: FiniteFloat = 1.0
    """Factor of this part in the sum, applied last; 0 only records the part."""
    normalise: bool = False
    """Bring the part to mean 0 and standard deviation 1, over everything that it scored in the run so far."""
    clip: tuple[FiniteFloat, FiniteFloat] | None = None
    """Hold the part (once normalised) between these two values."""

    @model_validator(mode="after")
    def _clip_in_order(self) -> _Part:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip {list(self.clip)} needs the lower value first")
        return self


class RewardModelPart(_Part):
    """The trained reward model."""

    source: Literal["reward_model"]
    """Tag of this part."""


class JudgePart(_Part):
    """The judge's margin, signed by what was asked and centred."""

    source: Literal["judge"]
    """Tag of this part."""


class RulesPart(_Part):
    """Rule functions."""

    source: Literal["rules"]
    """Tag of this part."""
    rules: list[RuleConfig] = Field(min_length=1)
    """The rules; their weighted values add up to the part."""


RewardPart = Annotated[RewardModelPart | JudgePart | RulesPart, Field(discriminator="source")]


def _each_source_once(parts: list[RewardPart]) -> list[RewardPart]:
    sources = [part.source for part in parts]
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"source {source!r} is given twice: keep one, with the sum of the weights")
    if not any(part.weight for part in parts):
        raise ValueError("every weight is 0, so there is nothing to learn from")
    return parts


RewardParts = Annotated[list[RewardPart], Field(min_length=1), AfterValidator(_each_source_once)]
"""The field of a stage that holds its mixture."""
