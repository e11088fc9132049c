"""Memory of one learner rank: what DeepSpeed keeps of weights, gradients and optimizer, and what a micro-batch needs.

``docs/planning.md`` has the formulas. They follow what DeepSpeed 0.19 and this learner do (``actors/deepspeed``), not
only the ZeRO paper (Rajbhandari et al., arXiv:1910.02054): gradients are fp32 at every stage, and AdamW is PyTorch's.
Legend: N numbers that train, R ranks, b bytes of a number in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.settings import LearnerConfig
from cluster.plan.activations import BYTES, Rows, Trained, activation_bytes
from cluster.plan.parts import Kind, Part, process_parts
from cluster.plan.shape import ModelShape
from rlhf.models.settings import ModelConfig

if TYPE_CHECKING:
    from rlhf.objectives.base import Head

ALL_REDUCE_NUMBERS = 500_000_000
"""Gradients that DeepSpeed flattens for one sum over ranks, at stages 0 and 1."""
LIVE_NUMBERS = 1_000_000_000
"""Gathered weights that DeepSpeed keeps at stage 3 before it lets go of some."""
SUB_GROUP_NUMBERS = 1_000_000_000
"""Weights that DeepSpeed updates together at stage 3."""


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, and how.

    Attributes:
        shape: The model.
        head: ``language_model`` or ``scalar``.
        config: Model, optimizer and DeepSpeed settings.
        ranks: Ranks of the gang.
        rows: The largest micro-batch.
        keeps_reference: Whether each rank holds a frozen copy of the start besides.
        bucket_bytes: Size of a publication bucket; 0 where nothing is published.
    """

    shape: ModelShape
    head: Head
    config: LearnerConfig
    ranks: int
    rows: Rows
    keeps_reference: bool = False
    bucket_bytes: float = 0.0


def trained_of(shape: ModelShape, config: ModelConfig, head: Head) -> Trained:
    """Which numbers of a model train, and how many layers a gradient goes through."""
    total = shape.language_parameters if head == "language_model" else shape.scalar_parameters
    own_head = shape.width if head == "scalar" else 0 if shape.is_tied else shape.embedding_parameters
    everything = frozenset(shape.linears)
    if config.adapter is not None:
        wanted = config.adapter.targets
        names = everything if wanted == "all-linear" else frozenset(name.rpartition(".")[2] for name in wanted)
        sizes = [inputs + outputs for name, (inputs, outputs) in shape.linears.items() if name in names]
        numbers = config.adapter.rank * (shape.layers * sum(sizes))
        if "lm_head" in names:
            numbers += config.adapter.rank * (shape.width + shape.vocabulary)
        numbers += shape.width * (head == "scalar")  # the score head trains in full, beside its frozen original
        return Trained(total + numbers, numbers, shape.layers, names & everything, config.adapter.rank)
    if config.trainable == "head":
        return Trained(total, own_head, 0, frozenset())
    if config.trainable == "last_layers":
        numbers = config.last_layers * shape.layer_parameters + shape.width + own_head
        return Trained(total, numbers, config.last_layers, everything)
    return Trained(total, total, shape.layers, everything)


def learner_parts(training: Training, *, on_gpu: bool) -> tuple[Part, ...]:
    """Everything that one rank holds, on its device and in host memory for it."""
    config, shape = training.config, training.shape
    trained = trained_of(shape, config.model, training.head)
    half = config.model.dtype == "bfloat16"
    state = _weights(training, trained) + _optimizer(training, trained) + _gradients(training, trained)
    if training.keeps_reference and config.model.adapter is None:
        state.append(Part("reference", "state", BYTES[config.model.dtype] * shape.language_parameters))
    activations, top = activation_bytes(shape, config.model, training.head, trained, training.rows)
    backward, update = _buffers(training, trained, half)
    # Activations are gone when the optimizer steps, so its copies count only where they are more.
    work = [Part("activations", "work", activations), Part("backward", "work", top), Part("buffers", "work", backward)]
    rest = update - activations - top - backward
    if rest > 0:
        work.append(Part("buffers", "work", rest))
    parts = [*state, *work]
    if training.bucket_bytes:
        parts.append(Part("bucket", "publish", _bucket(training)))
    return (*parts, *(process_parts(parts, talks=training.ranks > 1) if on_gpu else ()))


def _weights(training: Training, trained: Trained) -> list[Part]:
    item, zero, ranks = BYTES[training.config.model.dtype], training.config.deepspeed, training.ranks
    if zero.zero_stage < 3:
        return [Part("weights", "weights", item * trained.total)]
    shard = Part("weights", "host" if zero.offload_parameters else "weights", item * trained.total / ranks)
    gathers = ranks > 1 or zero.offload_parameters
    live = min(trained.total, LIVE_NUMBERS + zero.prefetch_elements) if gathers else 0
    return [shard, Part("buffers", "work", item * live)]


def _optimizer(training: Training, trained: Trained) -> list[Part]:
    """fp32 weights beside bf16 ones, and Adam's two running means."""
    zero, half = training.config.deepspeed, training.config.model.dtype == "bfloat16"
    shard = trained.numbers / (training.ranks if zero.zero_stage else 1)
    is_copied = half or zero.zero_stage in (1, 2) or (zero.zero_stage == 3 and zero.offload_optimizer)
    kind: Kind = "host" if zero.offload_optimizer else "state"
    parts = [Part("optimizer", kind, (8 + 4 * is_copied) * shard)]
    if zero.offload_optimizer:  # the gradient that is stepped with, and at stages 1 and 2 the weights on their way back
        back = BYTES[training.config.model.dtype] * (zero.zero_stage < 3)
        parts.append(Part("gradients", "host", (4 + back) * shard))
    return parts


def _gradients(training: Training, trained: Trained) -> list[Part]:
    zero, half = training.config.deepspeed, training.config.model.dtype == "bfloat16"
    whole, shard = 4.0 * trained.numbers, 4.0 * trained.numbers / training.ranks
    match zero.zero_stage:
        case 0:
            return [Part("gradients", "state", whole)]
        case 1:
            return [Part("gradients", "state", whole)] + (
                [Part("gradients", "state", shard)] if half and zero.offload_optimizer else []
            )
        case 2:
            on_host = zero.offload_optimizer and not half
            return [Part("gradients", "host" if on_host else "state", shard)]
        case _:
            return [Part("gradients", "host" if zero.offload_optimizer else "state", shard)]


def _buffers(training: Training, trained: Trained, half: bool) -> tuple[float, float]:
    """Bytes beside the activations while gradients are made, and bytes for the sum over ranks and the update."""
    zero, ranks, item = training.config.deepspeed, training.ranks, BYTES[training.config.model.dtype]
    numbers, shape = trained.numbers, training.shape
    largest = max(shape.embedding_parameters if trained.has_embedding(shape) else 0, shape.width * shape.mlp_width)
    largest = min(largest, numbers)
    reduced = min(numbers, ALL_REDUCE_NUMBERS + largest) if ranks > 1 else 0
    if zero.zero_stage == 0:
        return 0.0, 4.0 * reduced
    if zero.zero_stage == 1 and half and not zero.offload_optimizer:
        return 0.0, 2.0 * numbers + 4.0 * reduced  # bf16 gradients, before they are added to the fp32 ones
    bucket = min(zero.reduce_bucket_elements, numbers)
    reducing = item * bucket * (1 + zero.overlap_communication) + 4.0 * max(bucket, largest) * half
    copied = 0.0 if half or zero.offload_optimizer else 4.0 * numbers / ranks  # one flat gradient for the step
    if zero.zero_stage == 3:
        reducing += 4.0 * zero.reduce_bucket_elements
        copied = 0.0 if zero.offload_optimizer else 4.0 * min(numbers, SUB_GROUP_NUMBERS) / ranks
    return reducing, copied


def _bucket(training: Training) -> float:
    """A bucket of whole tensors, gathered where they are sharded; a merged adapter is computed in fp32."""
    shape, item = training.shape, BYTES[training.config.model.dtype]
    largest = max(shape.embedding_parameters, shape.width * shape.mlp_width)
    merged = 12.0 * shape.width * shape.mlp_width if training.config.model.adapter is not None else 0.0
    return max(training.bucket_bytes, item * largest) + merged
