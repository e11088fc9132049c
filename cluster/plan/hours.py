"""Time and cost of a stage on GPUs, from its tokens and stated shares of what the devices can do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from actors.vllm.config import EngineConfig
from cluster.config import RunConfig, Stage, learners_of, roles_of
from cluster.plan.activations import BYTES
from cluster.plan.devices import Device
from cluster.plan.parts import RoleMemory
from cluster.plan.shape import ModelShape
from cluster.plan.stage_memory import Shapes, shape_of
from cluster.plan.work import Samples, forward_operations, questions_of, samples_of, training_operations
from cluster.stages.online import OnlineStage

TRAINING_SHARE = 0.4
"""Of the device's peak, in training: Llama 3 reached 0.38 to 0.43 (arXiv:2407.21783, table 4)."""
READING_SHARE = 0.5
"""Of the peak, in forward passes over whole sequences."""
DRAWING_SHARE = 0.6
"""Of the memory bandwidth, while tokens are drawn one by one."""
FP32_SLOWDOWN = 8.0
"""Times that fp32 products take longer than bf16 ones."""


@dataclass(frozen=True, slots=True)
class StageHours:
    """A stage's time.

    Attributes:
        stage: Its name.
        by_role: Hours of work of each role, all its actors at once.
        hours: From its start to its end; roles wait for each other unless they overlap.
        gpus: That it holds.
        drawn: Tokens drawn.
        trained: Tokens trained on, passes counted.
    """

    stage: str
    by_role: Mapping[str, float]
    hours: float
    gpus: float
    drawn: float
    trained: float

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs: what they cost is paid while they are held."""
        return self.hours * self.gpus


def stage_hours(
    config: RunConfig, stage: Stage, shapes: Shapes, memories: Mapping[str, RoleMemory], work: tuple[Device, int | None]
) -> StageHours | None:
    """The time of a stage; None where it has no GPUs, or its models or its data are not at hand.

    Args:
        config: The recipe.
        stage: The stage.
        shapes: Of its models.
        memories: What one actor of each role holds.
        work: The GPUs, and how many records a data file has that is not at hand.
    """
    device, rows = work
    samples = samples_of(config, stage, rows)
    gpus = _held_gpus(config, stage)
    if samples is None or not gpus or any(shape_of(config, stage, role, shapes) is None for role in memories):
        return None
    by_role = {}
    reads = (samples.row_tokens, samples.context), _judged(config, stage, samples)
    for role, memory in memories.items():
        shape = shape_of(config, stage, role, shapes)
        assert shape is not None
        if role == "generation":
            seconds = drawing_seconds(shape, config.roles.generation.engine, memory, samples, device)
        elif role in learners_of(stage):
            seconds = _learning_seconds(stage, role, shape, samples, device)
        else:
            seconds = _reading_seconds(config, role, shape, reads[role == "judge"], device)
        by_role[role] = seconds / config.plan(role).count / 3600
    learning = sum(hours for role, hours in by_role.items() if role in ("learner", "critic", "reference"))
    drawing = sum(by_role.values()) - learning
    overlaps = isinstance(stage, OnlineStage) and stage.loop.max_staleness > 0 and config.gate == "open"
    hours = max(learning, drawing) if overlaps else learning + drawing
    drawn = samples.completions * samples.completion if "generation" in by_role else 0.0
    trained = samples.row_tokens * samples.passes if learners_of(stage) else 0.0
    return StageHours(stage.name, by_role, hours, gpus, drawn, trained)


def _held_gpus(config: RunConfig, stage: Stage) -> float:
    plans = [config.plan(role) for role in roles_of(config, stage)]
    whole = sum(plan.count * plan.gpus for plan in plans if plan.gpus >= 1)
    return whole + math.ceil(sum(plan.count * plan.gpus for plan in plans if plan.gpus < 1) - 1e-9)


def _learning_seconds(stage: Stage, role: str, shape: ModelShape, samples: Samples, device: Device) -> float:
    """Seconds that one rank would take for all of a learner's or a critic's work."""
    learner = learners_of(stage)[role]
    trained = training_operations(shape, learner, samples.row_tokens * samples.passes, samples.context)
    readings = 0
    if isinstance(stage, OnlineStage):  # values or log-probs of the start of a step; the adapter off: the reference's
        readings = 1 + (learner.model.adapter is not None and role == "learner")
    read = readings * forward_operations(shape, samples.row_tokens, samples.context)
    slow = FP32_SLOWDOWN if learner.model.dtype == "float32" else 1.0
    return slow * (trained / TRAINING_SHARE + read / READING_SHARE) / (device.peak_tflops * 1e12)


def _judged(config: RunConfig, stage: Stage, samples: Samples) -> tuple[float, float]:
    """Tokens that a judge reads, and how many each sees; questions are at most as long as the engine takes."""
    longest = config.roles.judge.engine.max_model_len
    return questions_of(config, stage, samples) * longest, longest / 2


def _reading_seconds(
    config: RunConfig, role: str, shape: ModelShape, read: tuple[float, float], device: Device
) -> float:
    """Seconds that one replica would take to read so many tokens, of which each sees so many."""
    section = getattr(config.roles, role)
    judges = role == "judge"
    dtype = section.engine.dtype if judges else section.dtype
    pieces = section.engine.tensor_parallel_size if judges else 1
    slow = FP32_SLOWDOWN if dtype == "float32" else 1.0
    return slow * forward_operations(shape, *read) / (READING_SHARE * device.peak_tflops * 1e12 * pieces)


def drawing_seconds(
    shape: ModelShape, engine: EngineConfig, memory: RoleMemory, samples: Samples, device: Device
) -> float:
    """Seconds in which one engine draws all completions.

    A step draws one token of every sequence in flight. It reads the weights once and every sequence's cache, so it
    takes as long as the memory needs for that, or as the products need where there are many sequences.
    """
    item, pieces = BYTES[engine.dtype], engine.tensor_parallel_size
    per_token = shape.kv_bytes_per_token(item, pieces)
    longest = samples.prompt + samples.completion
    cache = sum(part.size for part in memory.parts if part.kind == "kv_cache")
    in_flight = max(1.0, min(engine.max_num_seqs, samples.completions, cache / (per_token * longest)))
    seen = samples.prompt + samples.completion / 2
    weights = item * shape.language_parameters / pieces
    reading = (weights + in_flight * seen * per_token) / (DRAWING_SHARE * device.bandwidth_gbs * 1e9)
    computing = forward_operations(shape, in_flight, seen) / (READING_SHARE * device.peak_tflops * 1e12 * pieces)
    steps = samples.completions * samples.completion / in_flight
    prompts = forward_operations(shape, samples.prompts * samples.prompt, samples.prompt / 2)
    return steps * max(reading, computing) + prompts / (READING_SHARE * device.peak_tflops * 1e12 * pieces)


def assumptions(device: Device) -> list[str]:
    """What the times rest on, in words."""
    return [
        f"{device.name}: {device.memory_gib:g} GiB, {device.peak_tflops:g} TFLOP/s in bf16, "
        f"{device.bandwidth_gbs:g} GB/s",
        f"training at {TRAINING_SHARE:.0%} of the peak, reading at {READING_SHARE:.0%}, drawing at "
        f"{DRAWING_SHARE:.0%} of the memory bandwidth",
        "every prompt and completion as long as the recipe allows",
        "a file's tokens from its bytes, 4 to a token, or half of the longest where only --rows is known",
        "no time for starts, moves, publications, checkpoints, evaluations while training, or an optimizer in host "
        "memory",
    ]
