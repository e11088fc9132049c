"""What objectives can be told. Beside the losses and not in them, so that a configuration is checked without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config import StrictModel
from rlhf.maths.names import Aggregation, KlEstimator


class KlConfig(StrictModel):
    """A penalty on the distance from the reference."""

    coefficient: float = Field(default=0.0, ge=0.0)
    """How much a nat of KL per token costs; 0 turns the penalty off."""
    estimator: KlEstimator = "k3"
    """``k1``, ``k2`` or ``k3`` of Schulman (2020). In a loss k1 is weighted by the importance ratio, without which its
    expected gradient is zero."""


class PolicyConfig(StrictModel):
    """The policy's loss."""

    kind: Literal["policy"] = "policy"
    """Tag of this objective."""
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """The ratio is clipped above at 1 + clip_high; above clip_low leaves room for unlikely tokens (DAPO)."""
    importance_cap: float | None = Field(default=None, gt=0.0)
    """Weighs tokens by min(learner / generating engine, cap), which corrects for engines that compute slightly
    different or older log-probs. Absent: no correction; rollouts of older weights (loop.max_staleness) need one."""
    entropy_coefficient: float = Field(default=0.0, ge=0.0)
    """Reward per nat of entropy, in the loss."""
    kl: KlConfig = KlConfig()
    """KL to the reference, in the loss."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses become one number."""
    fixed_length: int | None = Field(default=None, gt=0)
    """Tokens to divide by under ``aggregation: fixed_length``; usually the token limit of generation."""

    @model_validator(mode="after")
    def _fixed_length_belongs_to_its_aggregation(self) -> PolicyConfig:
        if (self.aggregation == "fixed_length") != (self.fixed_length is not None):
            raise ValueError("fixed_length goes with aggregation 'fixed_length', and only with it")
        return self


class ValueConfig(StrictModel):
    """The critic's loss."""

    kind: Literal["value"] = "value"
    """Tag of this objective."""
    clip: float | None = Field(default=0.2, gt=0.0)
    """Values may move this far from those at the start of the step before the gradient stops; null: no limit."""


class RankConfig(StrictModel):
    """The loss of a reward model."""

    kind: Literal["rank"] = "rank"
    """Tag of this objective."""
    variant: Literal["log_sigmoid", "sigmoid"] = "log_sigmoid"
    """``log_sigmoid``: -log sigmoid(difference). ``sigmoid``: -sigmoid(difference), which lets go of pairs that are
    far on the wrong side and so suffers less from wrong labels."""
    margin: float = Field(default=0.0, ge=0.0)
    """What the better score has to exceed the worse one by."""
    centring: float = Field(default=0.0, ge=0.0)
    """Weight of the squared mean score of each prompt's ranked siblings, which a difference leaves free to drift."""


class SupervisedConfig(StrictModel):
    """The loss of supervised fine-tuning."""

    kind: Literal["supervised"] = "supervised"
    """Tag of this objective."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Whether every token or every completion weighs the same."""


class PreferenceConfig(StrictModel):
    """The loss of direct preference optimisation."""

    kind: Literal["preference"] = "preference"
    """Tag of this objective."""
    variant: Literal["dpo", "ipo"] = "dpo"
    """``dpo``: logistic loss. ``ipo``: squared distance to a fixed gap, which does not run away on clean labels."""
    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the pull to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Chance that a label is wrong (``dpo`` only)."""
    length_normalised: bool = False
    """Whether log-probs are averaged over tokens rather than summed, so that length does not pay."""

    @model_validator(mode="after")
    def _smoothing_belongs_to_dpo(self) -> PreferenceConfig:
        if self.variant == "ipo" and self.label_smoothing > 0:
            raise ValueError("label_smoothing goes with variant 'dpo' only")
        return self


ObjectiveConfig = Annotated[
    PolicyConfig | ValueConfig | RankConfig | SupervisedConfig | PreferenceConfig, Field(discriminator="kind")
]
