"""Settings of a model; imports no torch, so that a configuration is checked fast."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from rlhf.config import StrictModel


class LoraConfig(StrictModel):
    """Low-rank adapters on linear layers: W + (alpha / rank) B A, with only A and B trained."""

    rank: PositiveInt = 16
    """Rank of the update."""

    alpha: PositiveInt = 32
    """Scale: the update is multiplied by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input. Leave at 0 in reinforcement learning, or log-probabilities become noisy."""

    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; ``all-linear`` is every one but the head."""


class ModelConfig(StrictModel):
    """Which model, in which numbers, and which part of it trains."""

    path: str = ""
    """Local folder, hub id, or ``package:NAME`` for a GGUF file inside an installed package. Empty in a stage: where
    the stage starts by itself, which is the policy as the stages before left it, or the start model for a reward
    model."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the model computes in. A learner keeps fp32 master weights beside bf16 ones."""

    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel: ``sdpa`` runs torch's fused kernels on prompts and completions apart, so that siblings that
    share a prompt in a row cost nothing where they do not see each other; ``eager`` is the plain formula under a mask,
    to compare with."""

    adapter: LoraConfig | None = None
    """Trains low-rank adapters instead of the weights themselves."""

    trainable: Literal["all", "head", "last_layers"] = "all"
    """Which weights train where there is no adapter; the others are frozen."""

    last_layers: int = Field(default=0, ge=0)
    """With ``trainable: last_layers``: how many of the last layers train, beside the final norm and the head."""

    gradient_checkpointing: bool = False
    """Computes each layer again in the backward pass: keeps no activations, a third slower."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.trainable == "last_layers") != (self.last_layers > 0):
            raise ValueError("last_layers goes with trainable: last_layers, and has to be at least 1 there")
        if self.adapter is not None and self.trainable != "all":
            raise ValueError("an adapter freezes the model itself: leave trainable at 'all'")
        return self
