"""Losses as pure functions of tensors, one file each; the learner that runs them is always the same."""

from __future__ import annotations

from typing import Annotated, assert_never

from pydantic import Field

from rlhf.objectives.base import Objective
from rlhf.objectives.policy import PolicyConfig, PolicyObjective
from rlhf.objectives.preference import PreferenceConfig, PreferenceObjective
from rlhf.objectives.rank import RankConfig, RankObjective
from rlhf.objectives.supervised import SupervisedConfig, SupervisedObjective
from rlhf.objectives.value import ValueConfig, ValueObjective

ObjectiveConfig = Annotated[
    PolicyConfig | ValueConfig | RankConfig | SupervisedConfig | PreferenceConfig, Field(discriminator="kind")
]


def build_objective(config: ObjectiveConfig) -> Objective:
    """Returns the objective that a config's ``kind`` names."""
    match config:
        case PolicyConfig():
            return PolicyObjective(config)
        case ValueConfig():
            return ValueObjective(config)
        case RankConfig():
            return RankObjective(config)
        case SupervisedConfig():
            return SupervisedObjective(config)
        case PreferenceConfig():
            return PreferenceObjective(config)
        case _:
            assert_never(config)
