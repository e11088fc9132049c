"""Changes to a recipe that need less memory, the smallest first: what a shortfall is answered with once it is tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actors.parts import ENGINE_PARTS
from actors.settings import LearnerConfig
from actors.vllm.config import EngineConfig
from cluster.config import RunConfig, learners_of
from cluster.plan.stage_memory import rows_of
from cluster.sharing import PARTS

Change = tuple[str, tuple[str, ...]]
"""Its kind, and ``key=value`` items as on the command line."""

LORA_RANK = 16
"""Rank of the adapter that is tried."""


def changes_for(config: RunConfig, index: int, roles: Sequence[str], num_gpus: int) -> Iterator[Change]:
    """What could be tried, for the roles that lie on a device that is too small.

    Args:
        config: The recipe.
        index: Its stage that does not fit.
        roles: The roles on the device.
        num_gpus: GPUs of the whole cluster.
    """
    learners = [role for role in dict.fromkeys(roles) if role in learners_of(config.stages[index])]
    engines = [role for role in dict.fromkeys(roles) if PARTS.get(role) == ENGINE_PARTS]
    for role in engines:
        yield from _smaller_cache(config, role)
    for role in learners:
        yield from _smaller_batch(config, index, role)
    for role in dict.fromkeys(roles):
        if role in ("scorer", "reference"):
            yield from _smaller_reader(config, role)
    for role in learners:
        yield from _more_sharding(config, index, role, num_gpus)
    for role in engines:
        yield from _more_pieces(config, role)
    for role in learners:
        yield from _less_training(config, index, role)
    shorter = config.max_sequence_tokens // 2
    if shorter > config.sampling.max_tokens:
        yield "shorter", (f"max_sequence_tokens={shorter}",)


def _smaller_cache(config: RunConfig, role: str) -> Iterator[Change]:
    engine: EngineConfig = getattr(config.roles, role).engine
    if engine.kv_cache_gib is not None:
        for part in (2, 4, 8, 16):
            yield "cache", (f"roles.{role}.engine.kv_cache_gib={engine.kv_cache_gib / part:g}",)
    else:
        for share in (0.8, 0.7, 0.6, 0.5, 0.4):
            if share < engine.gpu_memory_utilization:
                yield "cache", (f"roles.{role}.engine.gpu_memory_utilization={share}",)
        if engine.gpu_memory_utilization < 0.9:
            yield "cache", (f"roles.{role}.engine.gpu_memory_utilization=0.9",)
    if engine.max_model_len > config.max_sequence_tokens and role == "generation":
        yield "length", (f"roles.{role}.engine.max_model_len={config.max_sequence_tokens}",)


def _more_pieces(config: RunConfig, role: str) -> Iterator[Change]:
    section = getattr(config.roles, role)
    for pieces in (2, 4, 8):
        if section.resources.gpus >= 1 and pieces > section.engine.tensor_parallel_size:
            cut = f"roles.{role}.engine.tensor_parallel_size={pieces}"
            yield "pieces", (cut, f"roles.{role}.resources.gpus={pieces}")


def _smaller_reader(config: RunConfig, role: str) -> Iterator[Change]:
    section = getattr(config.roles, role)
    half = f"roles.{role}.dtype=bfloat16"
    if section.dtype == "float32":
        yield "dtype", (half,)
    for part in (2, 4, 8):
        fewer = f"roles.{role}.max_tokens_per_batch={section.max_tokens_per_batch // part}"
        yield "reader", (fewer,)
        if section.dtype == "float32":
            yield "reader", (half, fewer)


def _smaller_batch(config: RunConfig, index: int, role: str) -> Iterator[Change]:
    stage, prefix = config.stages[index], f"stages.{index}.{role}"
    learner = learners_of(stage)[role]
    recompute = (f"{prefix}.model.gradient_checkpointing=true",)
    row = rows_of(config, stage, 1).tokens
    sizes = []
    size = learner.max_tokens_per_micro_batch // 2
    while size >= row:
        sizes.append((f"{prefix}.max_tokens_per_micro_batch={size}",))
        size //= 2
    if not learner.model.gradient_checkpointing:
        yield "recompute", recompute
    for smaller in sizes:
        yield "batch", smaller
    if not learner.model.gradient_checkpointing:
        for smaller in sizes:
            yield "batch", (*recompute, *smaller)


def _more_sharding(config: RunConfig, index: int, role: str, num_gpus: int) -> Iterator[Change]:
    """ZeRO stages up, then more ranks; with and without recomputed layers."""
    learner = learners_of(config.stages[index])[role]
    prefix, ranks = f"stages.{index}.{role}", config.plan(role).count
    recompute = _recompute(learner, prefix)
    stage_key = f"{prefix}.deepspeed.zero_stage"
    for stage in (2, 3):
        if ranks > 1 and stage > learner.deepspeed.zero_stage:
            yield "stage", (f"{stage_key}={stage}",)
            yield "stage", (f"{stage_key}={stage}", *recompute)
    more = 2 * ranks
    while more <= num_gpus and config.resources(role).gpus >= 1:
        yield "ranks", (f"roles.{role}.ranks={more}", f"{stage_key}=3")
        yield "ranks", (f"roles.{role}.ranks={more}", f"{stage_key}=3", *recompute)
        more *= 2


def _less_training(config: RunConfig, index: int, role: str) -> Iterator[Change]:
    """The optimizer in host memory, adapters in place of the weights, both."""
    learner = learners_of(config.stages[index])[role]
    prefix, zero = f"stages.{index}.{role}", learner.deepspeed
    recompute = _recompute(learner, prefix)
    offload: tuple[str, ...] = (f"{prefix}.deepspeed.offload_optimizer=true",)
    if zero.zero_stage < 2:
        offload = (f"{prefix}.deepspeed.zero_stage=2", *offload)
    if not zero.offload_optimizer:
        yield "offload", offload
        yield "offload", (*offload, *recompute)
    if learner.model.adapter is None and learner.model.trainable == "all":
        lora = (f"{prefix}.model.adapter.rank={LORA_RANK}",)
        yield "adapter", lora
        yield "adapter", (*lora, *recompute)


def _recompute(learner: LearnerConfig, prefix: str) -> tuple[str, ...]:
    return () if learner.model.gradient_checkpointing else (f"{prefix}.model.gradient_checkpointing=true",)
