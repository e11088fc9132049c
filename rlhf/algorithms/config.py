"""What algorithms can be told; apart from the algorithms, so that a configuration is checked without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.maths.names import KlEstimator
from rlhf.objectives.config import KlConfig, PolicyConfig, ValueConfig


class RewardKlConfig(KlConfig):
    """A penalty in the reward, where no gradient flows through it."""

    estimator: KlEstimator = "k1"
    """``k1`` makes the penalised score an unbiased estimate; ``k2`` and ``k3`` never pay a token."""


class AlgorithmSettings(StrictModel):
    """What all policy-gradient algorithms share."""

    num_epochs: int = Field(default=1, ge=1)
    """Times that a step trains on each of its rollouts."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimizer updates in one epoch of a step."""
    policy: PolicyConfig = PolicyConfig()
    """The policy's loss; ``policy.kl`` is the KL in the loss."""
    reward_kl: RewardKlConfig = RewardKlConfig()
    """The KL in the reward, from the log-probs at the start of the step."""


class GrpoConfig(AlgorithmSettings):
    """Group-relative policy optimisation."""

    name: Literal["grpo"] = "grpo"
    """Tag of this algorithm."""
    scale_by_std: bool = True
    """Whether advantages are divided by their group's standard deviation; false is Dr. GRPO (Liu et al. 2025)."""


class RlooConfig(AlgorithmSettings):
    """REINFORCE leave-one-out."""

    name: Literal["rloo"] = "rloo"
    """Tag of this algorithm."""


class PpoConfig(AlgorithmSettings):
    """Proximal policy optimisation."""

    name: Literal["ppo"] = "ppo"
    """Tag of this algorithm."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """GAE's weight of longer returns."""
    whiten_advantages: bool = True
    """Whether advantages get mean 0 and variance 1 over the whole step."""
    value: ValueConfig = ValueConfig()
    """The critic's loss."""


AlgorithmConfig = Annotated[GrpoConfig | RlooConfig | PpoConfig, Field(discriminator="name")]
