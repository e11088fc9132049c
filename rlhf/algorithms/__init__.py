"""Reinforcement learning algorithms, one file each: what it needs, its advantages, its objective, its source."""

from __future__ import annotations

from typing import Annotated, assert_never

from pydantic import Field

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.grpo import Grpo, GrpoConfig
from rlhf.algorithms.ppo import Ppo, PpoConfig
from rlhf.algorithms.rloo import Rloo, RlooConfig

AlgorithmConfig = Annotated[GrpoConfig | RlooConfig | PpoConfig, Field(discriminator="name")]


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
