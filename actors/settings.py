"""Settings of the learner; imports no torch, so that a configuration is checked fast."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from actors.deepspeed.config import DeepSpeedConfig, OptimConfig
from rlhf.config import StrictModel
from rlhf.models.settings import ModelConfig


class LearnerConfig(StrictModel):
    """One model in training: policy, critic, reward model or any other objective."""

    model: ModelConfig
    """What is trained, and which part of it."""

    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""

    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """How it is spread over ranks."""

    max_tokens_per_micro_batch: PositiveInt = 4096
    """Most padded tokens of one forward and backward pass on one rank: this bounds the memory of activations."""

    seed: int = Field(default=0, ge=0)
    """Of fresh heads, fresh adapters and dropout."""
