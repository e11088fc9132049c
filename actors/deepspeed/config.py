"""How the learner optimises, and how DeepSpeed spreads it over ranks."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf.config import StrictModel


class OptimConfig(StrictModel):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) and its learning-rate schedule."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of the gradient and of its square."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the mean square."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises linearly from 0."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after the warm-up, until the last optimizer step."""

    final_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Rate at the last step as a share of the peak; the linear and cosine schedules end there."""

    max_grad_norm: PositiveFloat = 1.0
    """The gradient is scaled down to this global norm."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas have to be at least 0 and below 1")
        return self


class DeepSpeedConfig(StrictModel):
    """How weights, gradients and optimizer state are spread (ZeRO, Rajbhandari et al., arXiv:1910.02054)."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: every rank holds everything. 1: optimizer state is sharded. 2: gradients too. 3: weights too."""

    offload_optimizer: bool = False
    """Keeps fp32 weights and optimizer state in host memory (stages 1 to 3)."""

    offload_parameters: bool = False
    """Keeps sharded weights in host memory between uses (stage 3)."""

    reduce_bucket_elements: PositiveInt = 50_000_000
    """Numbers in one gradient reduction."""

    gather_bucket_elements: PositiveInt = 50_000_000
    """Numbers in one gather of updated weights (stages 1 and 2)."""

    prefetch_elements: PositiveInt = 50_000_000
    """Numbers of weights fetched ahead of use (stage 3)."""

    persistent_elements: int = Field(default=100_000, ge=0)
    """Parameters smaller than this stay whole on every rank (stage 3)."""

    overlap_communication: bool = False
    """Reduces gradients while the backward pass goes on (GPUs)."""

    collective_timeout_s: PositiveFloat = 1800.0
    """Longest wait of one rank for the others in a collective."""

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        return self


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of one optimizer step.

    Args:
        config: Peak, warm-up and schedule.
        step: Optimizer steps applied so far; 0 for the first.
        total_steps: Optimizer steps in all.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left)


def deepspeed_settings(config: DeepSpeedConfig, *, dtype: str, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Gradients are summed over micro-batches and ranks in fp32 at every stage. Clipping is left out for fp32 at stage 0,
    where DeepSpeed checks neither norm nor finiteness and the engine does both.
    """
    half = dtype == "bfloat16"
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": config.reduce_bucket_elements,
        "allgather_bucket_size": config.gather_bucket_elements,
        "stage3_prefetch_bucket_size": config.prefetch_elements,
        "stage3_param_persistence_threshold": config.persistent_elements,
        "overlap_comm": config.overlap_communication,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": half},
        "communication_data_type": "fp32",
        "gradient_clipping": max_grad_norm if half or config.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if half and config.zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
