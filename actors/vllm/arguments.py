"""From our engine section to vLLM's arguments, on the platform that vLLM finds; imported where an engine starts."""

from __future__ import annotations

from pathlib import Path

from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from actors.vllm.config import EngineConfig
from actors.vllm.executor import WatchedMultiprocExecutor, WatchedUniProcExecutor
from actors.vllm.transfer import BACKEND, EXTENSION
from rlhf.errors import ConfigError

_DEFAULT_BATCHED_TOKENS = 2048
_CPU_BLOCK_SIZE = 32


def engine_arguments(model: Path, config: EngineConfig, where: str) -> AsyncEngineArgs:
    """Returns vLLM's arguments; settings that cannot work on this platform raise ``ConfigError``."""
    on_cpu = current_platform.is_cpu()
    batched_tokens = config.max_num_batched_tokens or max(_DEFAULT_BATCHED_TOKENS, config.max_model_len)
    if on_cpu:
        _check_cpu(config, batched_tokens, where)
    one = config.tensor_parallel_size == 1
    return AsyncEngineArgs(
        model=str(model),
        load_format="safetensors",
        trust_remote_code=False,
        dtype=config.dtype,
        seed=0,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max(batched_tokens, config.max_num_seqs),
        # A prompt that is split over two passes makes vLLM turn the request's random generator back, which a CPU's
        # cannot do: the engine dies of it.
        enable_chunked_prefill=not on_cpu,
        block_size=config.block_size or (_CPU_BLOCK_SIZE if on_cpu else None),
        kv_cache_memory_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * 2**30),
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_sleep_mode=config.enable_sleep and not on_cpu,
        distributed_executor_backend=WatchedUniProcExecutor if one else WatchedMultiprocExecutor,
        worker_extension_cls=EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        enable_log_requests=False,
    )


def _check_cpu(config: EngineConfig, batched_tokens: int, where: str) -> None:
    if config.kv_cache_gib is None:
        raise ConfigError(
            f"{where}: kv_cache_gib",
            found="null",
            needed="a size, as this engine runs on a CPU and would take most of its memory",
            action="Set kv_cache_gib, for example 1.0.",
        )
    if batched_tokens < config.max_model_len:
        raise ConfigError(
            f"{where}: max_num_batched_tokens",
            found=str(batched_tokens),
            needed=f"at least max_model_len ({config.max_model_len}) on a CPU",
            action="Raise it, or leave it out.",
        )
