"""What a vLLM engine is started with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.errors import ConfigError

_DEFAULT_BATCHED_TOKENS = 2048


class EngineConfig(StrictModel):
    """One vLLM engine, on CPU or GPU."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of weights and activations; published weights are cast to it."""
    max_model_len: int = Field(default=1024, ge=8)
    """Longest prompt and completion together, in tokens."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most completions that are drawn at the same time."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Most tokens, prompts included, in one forward pass; null is 2048, or ``max_model_len`` where that is more. On a
    CPU it cannot be less than ``max_model_len``, as prompts are not split there."""
    kv_cache_gib: float | None = Field(default=1.0, gt=0.0)
    """Memory of the KV cache in GiB per device; null takes what ``gpu_memory_utilization`` leaves, on GPUs only."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory that has to be free when the engine starts; weights, activations and cache may fill it
    where ``kv_cache_gib`` is null."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices that share one copy of the weights. On GPUs as many as the replica has (``resources.gpus``); it has to
    divide the model's attention heads."""
    enforce_eager: bool = True
    """Run layers as written; false compiles them (and captures CUDA graphs) at start, which pays in long runs."""
    enable_prefix_caching: bool = True
    """Compute what prompts share, such as the prompt of K siblings, once."""
    enable_sleep: bool = False
    """Let the engine give back GPU memory between phases (``gate: shared``); on a CPU there is nothing to give back.
    While it sleeps its weights are in host memory, and some GPU memory stays with its process."""
    block_size: int | None = Field(default=None, ge=16, multiple_of=16)
    """Tokens in a block of the KV cache; prompts share whole blocks. Null leaves the choice to vLLM (16 on most GPUs);
    on a CPU it is 32, as vLLM's own 128 is longer than many prompts."""
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    """Longest time from start to ready, in seconds."""
    generate_timeout_s: float = Field(default=900.0, gt=0.0)
    """Longest time for one call that draws completions or asks for label log-probabilities, in seconds."""
    update_timeout_s: float = Field(default=300.0, gt=0.0)
    """Longest time from the first to the last bucket of a weight publication, in seconds. A replica that takes a third
    of it for one step of a publication is given up, so that the others need not give up theirs."""

    @property
    def batched_tokens(self) -> int:
        """Most tokens in one forward pass, by what is configured or by default."""
        return self.max_num_batched_tokens or max(_DEFAULT_BATCHED_TOKENS, self.max_model_len)

    def check_cpu(self, section: str) -> None:
        """Refuses settings that cannot work on a CPU.

        Args:
            section: What stands before a key in errors, for example ``roles.judge.engine.``

        Raises:
            ConfigError: The cache has no size, or a prompt may be longer than a forward pass.
        """
        if self.kv_cache_gib is None:
            raise ConfigError(
                f"{section}kv_cache_gib",
                found="null",
                needed="a size, as this engine runs on a CPU and would take most of its memory",
                action="Set kv_cache_gib, for example 1.0.",
            )
        if self.batched_tokens < self.max_model_len:
            raise ConfigError(
                f"{section}max_num_batched_tokens",
                found=str(self.batched_tokens),
                needed=f"at least max_model_len ({self.max_model_len}) on a CPU",
                action="Raise it, or leave it out.",
            )
