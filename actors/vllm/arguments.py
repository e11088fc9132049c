"""From our engine section to vLLM's arguments, on the platform that vLLM finds; imported where an engine starts."""

from __future__ import annotations

from pathlib import Path

from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from actors.vllm.config import EngineConfig
from actors.vllm.executor import WatchedMultiprocExecutor, WatchedUniProcExecutor
from actors.vllm.transfer import BACKEND, EXTENSION

_CPU_BLOCK_SIZE = 32


def engine_arguments(model: Path, config: EngineConfig, where: str) -> AsyncEngineArgs:
    """Returns vLLM's arguments; settings that cannot work on this platform raise ``ConfigError``."""
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        config.check_cpu(f"{where}: ")
    one = config.tensor_parallel_size == 1
    return AsyncEngineArgs(
        model=str(model),
        load_format="safetensors",
        trust_remote_code=False,
        dtype=config.dtype,
        seed=0,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max(config.batched_tokens, config.max_num_seqs),
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
