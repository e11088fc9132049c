"""Bytes that a forward pass leaves for the backward pass, layer by layer as transformers' Llama keeps them.

Counted from the operations of ``transformers.models.llama`` and ``rlhf.models``, not from a rule of thumb: see
``docs/planning.md``. Legend: T tokens of the rows, D width, Q width of all query heads, F width of the MLP,
V vocabulary, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.plan.shape import ModelShape
from rlhf.models.settings import ModelConfig

if TYPE_CHECKING:
    from rlhf.objectives.base import Head

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""
CHUNK_ROWS = 32
"""Rows of logits that are widened to fp32 at a time (``rlhf.maths.ops.token_log_probs``)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The largest micro-batch: rows of a prompt and its completions.

    Attributes:
        tokens: Padded tokens of all rows, T.
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.
        siblings: Completions of a row.
        targets: Completion tokens whose logits are made, of all rows.
    """

    tokens: int
    prompt: int
    completion: int
    siblings: int = 1
    targets: int = 0

    @property
    def row(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.siblings * self.completion


@dataclass(frozen=True, slots=True)
class Trained:
    """Which part of a model trains.

    Attributes:
        total: All numbers, adapters included.
        numbers: Those that train.
        layers: Layers that a gradient goes through.
        linears: Linear layers, in each of those, that train or have an adapter.
        rank: Of the adapters; 0 where the weights themselves train.
    """

    total: int
    numbers: int
    layers: int
    linears: frozenset[str]
    rank: int = 0

    def has_embedding(self, shape: ModelShape) -> bool:
        """Whether the embedding or a head of its own trains."""
        return self.rank == 0 and self.numbers >= shape.embedding_parameters


def activation_bytes(
    shape: ModelShape, config: ModelConfig, head: Head, trained: Trained, rows: Rows
) -> tuple[float, float]:
    """Bytes that wait for the backward pass, and the most that it needs besides: logits, or the gradients of a layer.

    Args:
        shape: The model.
        config: Its dtype, attention and checkpointing.
        head: What stands on the backbone.
        trained: Which part of it trains.
        rows: The micro-batch.
    """
    item = BYTES[config.dtype]
    layer = rows.tokens * _layer_bytes(shape, item, trained) + _attention_bytes(shape, config, item, rows)
    # The head sees some of the last norm's output, copied; nothing is kept where a gradient goes no further.
    last_norm = rows.tokens * _norm_bytes(shape.width, item, trained, feeds_linear=False) if trained.layers else 0.0
    gradients = 3.0 * item * shape.mlp_width * rows.tokens  # of the MLP, while a layer is run backwards
    weight = shape.width * shape.mlp_width * (item + 4 * (item < 4)) if trained.rank == 0 else 0
    gradients += weight if trained.layers else 0
    if config.gradient_checkpointing:
        kept = float(trained.layers * item * shape.width * rows.tokens)
        gradients += layer if trained.layers else 0
    else:
        kept = trained.layers * layer
    above, below = _head_bytes(shape, item, head, trained, rows)
    return kept + last_norm, max(above, below + gradients)


def _norm_bytes(width: int, item: int, trained: Trained, *, feeds_linear: bool) -> float:
    """Per token: the input in fp32, the normed input where the scale trains, and the output for the linear layers."""
    scale_trains = trained.rank == 0
    return width * (4 + item * scale_trains + item * feeds_linear)


def _layer_bytes(shape: ModelShape, item: int, trained: Trained) -> float:
    """Per token of one layer, but for the attention itself."""
    before_attention = bool(trained.linears & {"q_proj", "k_proj", "v_proj"})
    before_mlp = bool(trained.linears & {"gate_proj", "up_proj"})
    norms = _norm_bytes(shape.width, item, trained, feeds_linear=before_attention)
    norms += _norm_bytes(shape.width, item, trained, feeds_linear=before_mlp)
    if shape.qk_norm:
        norms += _norm_bytes(shape.query_width + shape.kv_width, item, trained, feeds_linear=False)
    # Gate, its SiLU and up; their product is kept for the weights or the adapter of the layer that follows.
    mlp = item * shape.mlp_width * (3 + ("down_proj" in trained.linears))
    adapters = item * trained.rank * len(trained.linears)
    return norms + mlp + adapters


def _attention_bytes(shape: ModelShape, config: ModelConfig, item: int, rows: Rows) -> float:
    """Of one layer, all rows: queries, keys and values as the kernel sees them, its output and its row sums."""
    width = item * shape.query_width
    num_rows = rows.tokens / rows.row
    if config.attention == "eager":
        weights = rows.row * shape.heads * (4 + (item if item < 4 else 0))
        return rows.tokens * (4 * width + weights)
    if rows.siblings == 1:
        return rows.tokens * (4.0 * width + 4 * shape.heads)
    own = rows.siblings * rows.completion
    # Queries of the rows and of the completions; keys and values of the prompts, and of each completion with its
    # prompt before it; outputs of both kernels and in the order of the rows.
    seen = rows.prompt + rows.siblings * (rows.prompt + rows.completion)
    states = (rows.row + own) + 2 * seen + (rows.prompt + own) + rows.row
    return num_rows * (states * width + 4 * shape.heads * rows.row)


def _head_bytes(shape: ModelShape, item: int, head: Head, trained: Trained, rows: Rows) -> tuple[float, float]:
    """Bytes of the head while its gradient is made, and what is left of them while the layers are run backwards."""
    if head == "scalar":
        return 8.0 * shape.width * rows.targets, 0.0
    logits = float(item * rows.targets * shape.vocabulary)
    weights = float(item * shape.embedding_parameters) if trained.has_embedding(shape) else 0.0
    hidden = item * rows.targets * shape.width
    chunk = 3.0 * 4 * CHUNK_ROWS * shape.vocabulary
    # A tied weight's gradient waits for its other half, that of the embedding, until the layers are done.
    waiting = weights if shape.is_tied else 0.0
    return hidden + max(2 * logits + chunk, logits + weights), hidden + waiting
