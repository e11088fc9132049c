"""Memory of roles that only read a model: vLLM engines, reward model, reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.vllm.config import EngineConfig
from cluster.plan.activations import BYTES, CHUNK_ROWS
from cluster.plan.devices import GIB
from cluster.plan.parts import Part, RoleMemory, process_parts
from cluster.plan.shape import ModelShape
from rlhf.errors import PlacementError

if TYPE_CHECKING:
    from rlhf.objectives.base import Head

GRAPHS_GIB = 1.0
"""CUDA graphs and compiled kernels of an engine with ``enforce_eager: false``. An assumption."""
SAMPLER_COPIES = 4
"""fp32 copies of the logits that vLLM's sampler makes: logits, log-probs, probabilities, random numbers."""


def engine_memory(
    role: str, shape: ModelShape, config: EngineConfig, *, device_bytes: float | None, bucket_bytes: float = 0.0
) -> RoleMemory:
    """What one engine holds on each of its devices.

    Args:
        role: ``generation`` or ``judge``.
        shape: The model.
        config: vLLM's settings.
        device_bytes: Memory of a device; None on a CPU, or where it is not known.
        bucket_bytes: Size of a publication bucket; 0 where nothing is published to it.

    Raises:
        PlacementError: The cache has no room for one sequence of ``max_model_len`` tokens.
    """
    item, pieces = BYTES[config.dtype], config.tensor_parallel_size
    # Norms are whole on each device, and heads of keys that are fewer than the devices are copied.
    copied = max(0, pieces - shape.kv_heads) * 2 * shape.width * shape.head_width * shape.layers / pieces
    weights = item * (shape.language_parameters / pieces + copied)
    per_token = shape.kv_bytes_per_token(item, pieces)
    work = _engine_work(shape, config, item)
    parts = [Part("weights", "weights", weights), Part("activations", "work", work)]
    if bucket_bytes:
        largest = item * max(shape.embedding_parameters, shape.width * shape.mlp_width)
        parts.append(Part("bucket", "publish", max(bucket_bytes, largest)))
    process = process_parts((), talks=pieces > 1)[:1] if device_bytes is not None else ()
    if not config.enforce_eager and device_bytes is not None:
        process += (Part("process", "process", GRAPHS_GIB * GIB),)
    cache = 0.0
    if config.kv_cache_gib is not None:
        cache = config.kv_cache_gib * GIB
    elif device_bytes is not None:
        free = config.gpu_memory_utilization * device_bytes
        cache = free - weights - work - sum(part.size for part in process)
    sequence = per_token * config.max_model_len
    if config.kv_cache_gib is not None or device_bytes is not None:
        _check_cache(role, config, cache, sequence)
    note = f"{per_token / 1024:.0f} KiB of cache a token, {cache / sequence:.0f} sequences of {config.max_model_len}"
    parts.append(Part("KV cache", "kv_cache", cache))
    return RoleMemory(role, (*parts, *process), note if cache else "")


def _engine_work(shape: ModelShape, config: EngineConfig, item: int) -> float:
    """Of one forward pass: a layer's states of all tokens in flight, or the logits of all sequences."""
    tokens = max(config.batched_tokens, config.max_num_seqs)
    states = 4 * shape.width + (2 * shape.query_width + 2 * shape.kv_width + 3 * shape.mlp_width)
    logits = config.max_num_seqs * shape.vocabulary * (item + 4 * SAMPLER_COPIES)
    return float(max(tokens * item * states, logits))


def _check_cache(role: str, config: EngineConfig, cache: float, sequence: float) -> None:
    if cache < sequence:
        raise PlacementError(
            f"role {role}",
            found=f"{max(cache, 0.0) / GIB:.2f} GiB for the KV cache on a device, after weights and activations",
            needed=f"{sequence / GIB:.2f} GiB for one sequence of {config.max_model_len} tokens",
            action="Raise kv_cache_gib or gpu_memory_utilization, shorten max_model_len, or cut the engine over more "
            "GPUs (tensor_parallel_size).",
        )


def frozen_memory(role: str, shape: ModelShape, *, dtype: str, max_tokens: int, head: Head, on_gpu: bool) -> RoleMemory:
    """What a reward model or a reference holds: weights, and one layer's states or the logits.

    Args:
        role: ``scorer`` or ``reference``.
        shape: The model.
        dtype: What it computes in.
        max_tokens: Padded tokens of one forward pass; at most all of them have logits.
        head: What stands on the backbone.
        on_gpu: Whether CUDA's own memory counts.
    """
    item = BYTES[dtype]
    numbers = shape.language_parameters if head == "language_model" else shape.scalar_parameters
    # Without gradients: the residual stream and its norm in fp32 and back, then attention or the MLP.
    layer = shape.width * (2 * item + 8) + item * max(4 * shape.query_width, 3 * shape.mlp_width)
    states = float(max_tokens * layer)
    logits = 0.0
    if head == "language_model":
        logits = float(item * max_tokens * (shape.vocabulary + 2 * shape.width)) + 12.0 * CHUNK_ROWS * shape.vocabulary
    parts = (Part("weights", "weights", float(item * numbers)), Part("activations", "work", max(states, logits)))
    return RoleMemory(role, (*parts, *(process_parts(parts, talks=False) if on_gpu else ())))
