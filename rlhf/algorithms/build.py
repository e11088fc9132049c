"""From an algorithm's settings to the algorithm."""

from __future__ import annotations

from typing import assert_never

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.config import AlgorithmConfig, GrpoConfig, PpoConfig, RlooConfig
from rlhf.algorithms.grpo import Grpo
from rlhf.algorithms.ppo import Ppo
from rlhf.algorithms.rloo import Rloo


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Returns the algorithm that a config's ``name`` names."""
    match config:
        case GrpoConfig():
            return Grpo(config)
        case RlooConfig():
            return Rloo(config)
        case PpoConfig():
            return Ppo(config)
        case _:
            assert_never(config)
