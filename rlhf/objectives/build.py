"""From an objective's settings to the objective."""

from __future__ import annotations

from typing import assert_never

from rlhf.objectives.base import Objective
from rlhf.objectives.config import (
    ObjectiveConfig,
    PolicyConfig,
    PreferenceConfig,
    RankConfig,
    SupervisedConfig,
    ValueConfig,
)
from rlhf.objectives.policy import PolicyObjective
from rlhf.objectives.preference import PreferenceObjective
from rlhf.objectives.rank import RankObjective
from rlhf.objectives.supervised import SupervisedObjective
from rlhf.objectives.value import ValueObjective


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
