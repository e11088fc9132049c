"""Shapes of models: as many numbers as transformers makes, and a clear word where a model is of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from cluster.plan.learner_memory import trained_of
from cluster.plan.shape import find_shape, parse_shape, read_shape
from rlhf.errors import ConfigError
from rlhf.models.load import _prepare
from rlhf.models.settings import LoraConfig, ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=16),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3, biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True, tie_word_embeddings=True),
}
SHAPES = Path(__file__).resolve().parents[3] / "configs" / "gpu" / "shapes"


def on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind.from_config(config)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_are_those_of_the_real_model(name: str) -> None:
    config = FAMILIES[name]
    shape = parse_shape(json.loads(config.to_json_string(use_diff=False)), name)
    assert shape.language_parameters == count(on_meta(AutoModelForCausalLM, config))
    config.num_labels = 1
    assert shape.scalar_parameters == count(on_meta(AutoModelForSequenceClassification, config))


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": LoraConfig(rank=4)},
        {"adapter": LoraConfig(rank=4, targets=("q_proj", "self_attn.v_proj"))},
        {"adapter": LoraConfig(rank=4, targets=("down_proj", "lm_head"))},
        {"trainable": "head"},
        {"trainable": "last_layers", "last_layers": 2},
        {},
    ],
)
def test_numbers_that_train_are_those_of_the_real_model(fields: dict[str, Any]) -> None:
    config = FAMILIES["llama"]
    settings = ModelConfig(dtype="float32", **fields)
    model = _prepare(on_meta(AutoModelForCausalLM, config), settings, "language_model")
    trained = trained_of(parse_shape(config.to_dict(), "test"), settings, "language_model")
    assert trained.total == count(model)
    assert trained.numbers == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Llama-3.1-70B-Instruct", 70_553_706_496),
    ],
)
def test_shipped_shapes_have_the_published_numbers(name: str, numbers: int) -> None:
    assert read_shape(SHAPES / name / "config.json").language_parameters == numbers


def test_heads_that_are_fewer_than_the_devices_are_copied() -> None:
    shape = parse_shape(FAMILIES["llama"].to_dict(), "test")
    assert shape.kv_bytes_per_token(2) == 2 * 3 * 2 * 8 * 2
    assert shape.kv_bytes_per_token(2, pieces=2) == shape.kv_bytes_per_token(2, pieces=6) == 2 * 3 * 1 * 8 * 2


def test_a_model_that_is_at_hand_comes_before_the_shape_beside_the_recipe(tmp_path: Path) -> None:
    beside, own = tmp_path / "shapes" / "small", tmp_path / "own" / "small"
    for folder, layers in ((beside, 3), (own, 5)):
        folder.mkdir(parents=True)
        settings = FAMILIES["llama"].to_dict() | {"num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(settings))
    shapes = tmp_path / "shapes"
    assert find_shape(str(own), shapes).layers == 5
    assert find_shape("nobody-has/small", shapes).layers == 3
    assert find_shape("nobody-has/small") is None
    assert find_shape("nobody-has/other", shapes) is None
    assert find_shape("package:no_such_package", shapes) is None


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": "llama", "num_local_experts": 8}, "'llama'"),
        ({"model_type": "llama", "hidden_size": 8}, "num_attention_heads"),
    ],
)
def test_other_models_are_named(settings: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_shape(settings, "here")
    assert (caught.value.where, caught.value.exit_code) == ("here", 2)
    assert found in caught.value.found
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        read_shape(tmp_path / "config.json")
