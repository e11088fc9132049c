"""The shape of a model from its own ``config.json``: how many numbers it has, and where. No weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of decoders that are laid out alike: embedding, layers of attention and gated MLP, norm, head."""
SHAPES_FOLDER = "shapes"
"""Beside a recipe: ``shapes/NAME/config.json`` for models that are not at hand."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of the Llama family.

    Attributes:
        vocabulary: V, rows of the embedding.
        width: D, the hidden size.
        layers: Decoder layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_width: Width of one head.
        mlp_width: Width of the MLP.
        is_tied: Whether the head is the embedding.
        qkv_bias: Whether queries, keys and values have a bias.
        output_bias: Whether the attention's output has one.
        mlp_bias: Whether the MLP has one.
        qk_norm: Whether queries and keys are normed.
        source: Where the shape was read.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    is_tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    source: str = ""

    @property
    def query_width(self) -> int:
        """All heads of the queries together."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """All heads of the keys, and of the values, together."""
        return self.kv_heads * self.head_width

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one decoder layer, by name."""
        return {
            "q_proj": (self.width, self.query_width),
            "k_proj": (self.width, self.kv_width),
            "v_proj": (self.width, self.kv_width),
            "o_proj": (self.query_width, self.width),
            "gate_proj": (self.width, self.mlp_width),
            "up_proj": (self.width, self.mlp_width),
            "down_proj": (self.mlp_width, self.width),
        }

    @property
    def embedding_parameters(self) -> int:
        """Numbers of the embedding, and of a head of its own."""
        return self.vocabulary * self.width

    @property
    def layer_parameters(self) -> int:
        """Numbers of one decoder layer."""
        matrices = sum(inputs * outputs for inputs, outputs in self.linears.values())
        biases = (self.query_width + 2 * self.kv_width) * self.qkv_bias + self.width * self.output_bias
        biases += (2 * self.mlp_width + self.width) * self.mlp_bias
        return matrices + biases + 2 * self.width + 2 * self.head_width * self.qk_norm

    @property
    def backbone_parameters(self) -> int:
        """Numbers of embedding, layers and last norm."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.width

    @property
    def language_parameters(self) -> int:
        """Numbers of the language model; a tied head counts once."""
        return self.backbone_parameters + (0 if self.is_tied else self.embedding_parameters)

    @property
    def scalar_parameters(self) -> int:
        """Numbers of the same backbone with a head of one output: a reward model or a critic."""
        return self.backbone_parameters + self.width

    def kv_bytes_per_token(self, item_bytes: int, pieces: int = 1) -> int:
        """Bytes of keys and values of one token in all layers, on one of the devices that an engine is cut over.

        Heads that are fewer than the devices are copied.
        """
        heads = max(1, -(-self.kv_heads // pieces))
        return 2 * self.layers * heads * self.head_width * item_bytes


def parse_shape(settings: Mapping[str, Any], where: str) -> ModelShape:
    """Reads the shape from a model's settings.

    Args:
        settings: What ``config.json`` holds.
        where: Names it in errors.

    Raises:
        ConfigError: Another kind of model, or one without a size that is needed.
    """
    family = settings.get("model_type")
    if family not in FAMILIES or settings.get("num_experts") or settings.get("num_local_experts"):
        raise _unknown(where, f"model_type {family!r}", f"one of {', '.join(FAMILIES)}")
    try:
        width, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
        bias = bool(settings.get("attention_bias", False))
        return ModelShape(
            vocabulary=int(settings["vocab_size"]),
            width=width,
            layers=int(settings["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(settings.get("num_key_value_heads") or heads),
            head_width=int(settings.get("head_dim") or width // heads),
            mlp_width=int(settings["intermediate_size"]),
            is_tied=bool(settings.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or (bias and family in ("llama", "qwen3")),
            output_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=family == "llama" and bool(settings.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            source=where,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown(where, f"no usable {error}", "the sizes of a decoder") from None


def _unknown(where: str, found: str, needed: str) -> ConfigError:
    return ConfigError(where, found=found, needed=needed, action="Memory is planned for these models only.")


def read_shape(path: Path) -> ModelShape:
    """The shape of a model from its ``config.json``.

    Raises:
        ConfigError: The file cannot be read, or is of another kind of model.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unknown(str(path), f"no JSON that can be read ({error})", "a model's config.json") from None
    return parse_shape(settings if isinstance(settings, dict) else {}, str(path))


def find_shape(reference: str, shapes: Path | None = None) -> ModelShape | None:
    """The shape of a model that is at hand, or else the one that lies beside the recipe; None where there is neither.

    Args:
        reference: As in a recipe: folder, hub id, ``package:NAME``.
        shapes: Folder with ``NAME/config.json``, where NAME is the last part of the reference.

    Raises:
        ConfigError: There is a ``config.json``, of another kind of model.
    """
    from rlhf.models.resolve import find_settings

    path = find_settings(reference)
    if path is None and shapes is not None:
        beside = shapes / reference.rstrip("/").rpartition("/")[2] / "config.json"
        path = beside if beside.is_file() else None
    return None if path is None else read_shape(path)
