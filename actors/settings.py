"""Settings of the learner and of a judging service; imports no torch, so that a configuration is checked fast."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, PositiveInt, SecretStr, field_validator

from actors.deepspeed.config import DeepSpeedConfig, OptimConfig
from rlhf.config import StrictModel
from rlhf.errors import ConfigError
from rlhf.models.settings import ModelConfig


class LearnerConfig(StrictModel):
    """One model in training: policy, critic, reward model or any other objective."""

    model: ModelConfig = ModelConfig()
    """What is trained, and which part of it."""

    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""

    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """How it is spread over ranks."""

    max_tokens_per_micro_batch: PositiveInt = 4096
    """Most padded tokens of one forward and backward pass on one rank: this bounds the memory of activations."""

    seed: int | None = None
    """Of fresh adapters and dropout; unset: the run's."""


class EndpointConfig(StrictModel):
    """A service that judges."""

    base_url: str = Field(pattern=r"^https?://")
    """Where the service is, for example ``http://localhost:8000/v1``. It stands in records as it is, so it holds no
    user and no password: the key comes from ``api_key_variable``."""
    model: str = Field(min_length=1)
    """The model's name at the service."""
    api: Literal["completions", "chat"] = "completions"
    """``completions`` continues the judge's text with a label, as the vLLM judge does; ``chat`` sends it as a message
    and asks for one of the labels as the whole answer."""
    api_key_variable: str | None = "RLHF_JUDGE_API_KEY"
    """Environment variable that holds the key; null for a service that asks for none."""
    top_log_probs: int = Field(default=20, ge=2, le=20)
    """How many of the likeliest tokens the service reports; a label that is not among them is a missing verdict."""
    timeout_s: float = Field(default=60.0, gt=0.0)
    """Longest wait for one answer, in seconds."""
    max_retries: int = Field(default=4, ge=0, le=20)
    """Further tries, with growing pauses, where the service is busy (429), failing (5xx) or out of reach."""
    max_concurrency: int = Field(default=16, ge=1)
    """Questions under way at the same time."""

    @field_validator("base_url")
    @classmethod
    def _no_user_info(cls, base_url: str) -> str:
        if "@" in base_url:
            raise ValueError("an address without user and password (%40 for an @ in its path); see api_key_variable")
        return base_url

    def key(self) -> SecretStr:
        """The key from this process's environment; ``ConfigError`` where the variable is not set."""
        if self.api_key_variable is None:
            return SecretStr("none")
        key = os.environ.get(self.api_key_variable, "")
        if not key:
            raise ConfigError(
                "roles.judge.endpoint.api_key_variable",
                found=f"no environment variable {self.api_key_variable}",
                needed=f"the key of {self.base_url}",
                action="Set the variable, or api_key_variable to null for a service that asks for none.",
            )
        return SecretStr(key)
