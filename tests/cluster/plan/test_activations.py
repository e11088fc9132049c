"""Planned activations against the bytes that PyTorch really keeps for the backward pass, operation by operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, Qwen2Config, Qwen3Config

from actors.host_memory import storage_id
from cluster.plan.activations import BYTES, Rows, activation_bytes
from cluster.plan.learner_memory import trained_of
from cluster.plan.shape import parse_shape
from rlhf.maths.packing import pack
from rlhf.models import attention
from rlhf.models.forward import language_outputs, scalar_outputs
from rlhf.models.load import _prepare, _use_scalar_head
from rlhf.models.settings import LoraConfig, ModelConfig
from rlhf.types import TrainGroup

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
ADAPTER = LoraConfig(rank=8)
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({"dtype": "float32"}, 1),
    "bf16": ({}, 1),
    "recomputed": ({"gradient_checkpointing": True}, 1),
    "adapter": ({"adapter": ADAPTER}, 1),
    "adapter of queries": ({"adapter": LoraConfig(rank=8, targets=("q_proj",))}, 1),
    "adapter recomputed": ({"adapter": ADAPTER, "gradient_checkpointing": True}, 1),
    "last layers": ({"trainable": "last_layers", "last_layers": 2}, 1),
    "head": ({"trainable": "head"}, 1),
    "siblings": ({}, 3),
    "siblings fp32": ({"dtype": "float32"}, 3),
    "eager": ({"attention": "eager"}, 1),
}
PROMPT, COMPLETION = 192, 128
"""Long enough for torch's fused kernel on a CPU, which a GPU takes at any length."""


def kept_bytes(config: Any, model_config: ModelConfig, head: str, siblings: int, num_groups: int) -> tuple[int, int]:
    """Bytes of all storages that autograd keeps, but for the model's own, and the number of targets."""
    kind = AutoModelForCausalLM if head == "language_model" else AutoModelForSequenceClassification
    settings = config(**SIZES, tie_word_embeddings=False, num_labels=1)
    name = attention.register() if model_config.attention == "sdpa" else model_config.attention
    model = kind.from_config(settings, attn_implementation=name).to(getattr(torch, model_config.dtype))
    if head == "scalar":
        _use_scalar_head(model)
        model.config.pad_token_id = 0
    model = _prepare(model, model_config, head).train()
    rng = np.random.default_rng(0)
    groups = [
        TrainGroup(
            uid=str(i),
            prompt_ids=rng.integers(0, 500, PROMPT).astype(np.int32),
            completion_ids=tuple(rng.integers(0, 500, COMPLETION).astype(np.int32) for _ in range(siblings)),
        )
        for i in range(num_groups)
    ]
    batch = pack(groups, pad_id=0)
    own = {storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in own:
            found[storage_id(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if head == "language_model":
            language_outputs(model, batch)
        else:
            scalar_outputs(model, batch, per_token=True)
    return sum(storage.nbytes() for storage in found.values()), num_groups * siblings * COMPLETION


@pytest.mark.parametrize(
    ("config", "name"),
    [*((LlamaConfig, name) for name in CASES), (Qwen2Config, "bf16"), (Qwen3Config, "bf16")],
)
def test_what_is_planned_is_what_autograd_keeps(name: str, config: Any) -> None:
    fields, siblings = CASES[name]
    model_config = ModelConfig(**fields)
    found, targets = kept_bytes(config, model_config, "language_model", siblings, 2)
    shape = parse_shape(config(**SIZES, tie_word_embeddings=False).to_dict(), "test")
    rows = Rows(2 * (PROMPT + siblings * COMPLETION), PROMPT, COMPLETION, siblings, targets)
    trained = trained_of(shape, model_config, "language_model")
    kept, _ = activation_bytes(shape, model_config, "language_model", trained, rows)
    logits = BYTES[model_config.dtype] * targets * (shape.vocabulary + shape.width)
    assert found == pytest.approx(kept + logits, rel=0.05), (found, kept, logits)


@pytest.mark.parametrize("name", ["fp32", "bf16", "adapter"])
def test_a_scalar_head_keeps_no_logits(name: str) -> None:
    model_config = ModelConfig(**CASES[name][0])
    found, targets = kept_bytes(LlamaConfig, model_config, "scalar", 1, 2)
    shape = parse_shape(LlamaConfig(**SIZES, tie_word_embeddings=False).to_dict(), "test")
    rows = Rows(2 * (PROMPT + COMPLETION), PROMPT, COMPLETION, 1, targets)
    kept, _ = activation_bytes(shape, model_config, "scalar", trained_of(shape, model_config, "scalar"), rows)
    assert found == pytest.approx(kept + 8 * targets * shape.width, rel=0.05)
