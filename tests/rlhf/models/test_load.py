from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf.errors import ConfigError
from rlhf.maths.packing import pack
from rlhf.models.forward import scalar_outputs
from rlhf.models.load import check_architecture, load_policy, load_scalar, padding_token
from rlhf.models.settings import LoraConfig, ModelConfig
from tests.rlhf.models.conftest import make_groups
from tests.tiny import build_tiny_model, draw_head


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_reward_model_scores_the_same_in_plain_transformers(tiny: Path, tmp_path: Path) -> None:
    """The saved model, one right-padded sequence per row, against the packed forward."""
    source = build_tiny_model(tmp_path / "pad_is_eos")
    config = AutoConfig.from_pretrained(source)
    config.pad_token_id = config.eos_token_id
    config.save_pretrained(source)
    model = draw_head(load_scalar(ModelConfig(path=str(source), dtype="float32"))).eval()
    assert model.config.pad_token_id != config.eos_token_id
    model.save_pretrained(tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()

    groups = make_groups()
    stop = np.array([config.eos_token_id], np.int32)
    groups = [
        type(g)(uid=g.uid, prompt_ids=g.prompt_ids, completion_ids=tuple(np.append(c, stop) for c in g.completion_ids))
        for g in groups
    ]
    rows = [np.concatenate([g.prompt_ids, c]) for g in groups for c in g.completion_ids]
    ids = torch.full((len(rows), max(map(len, rows))), model.config.pad_token_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        ours = scalar_outputs(model, pack(groups, pad_id=0), per_token=False).sequence_scores
        theirs = plain(ids, attention_mask=(ids != model.config.pad_token_id).long()).logits[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert ours.std() > 1e-3


def test_a_fresh_head_prefers_nothing_and_a_saved_one_is_kept(tiny: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny), dtype="float32")
    fresh = load_scalar(config)
    assert not scalar_outputs(fresh, pack(make_groups(), pad_id=0), per_token=False).sequence_scores.any()
    draw_head(fresh).save_pretrained(tmp_path)
    loaded = load_scalar(config.model_copy(update={"path": str(tmp_path)}))
    assert torch.equal(loaded.score.weight, fresh.score.weight)


def test_scores_of_a_bf16_model_are_fp32(tiny: Path) -> None:
    model = draw_head(load_scalar(ModelConfig(path=str(tiny)))).eval()
    scores = scalar_outputs(model, pack(make_groups(), pad_id=0), per_token=False).sequence_scores
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_what_trains(tiny: Path) -> None:
    config = ModelConfig(path=str(tiny), dtype="float32")

    def with_(**update) -> ModelConfig:
        return ModelConfig(**{**config.model_dump(), **update})

    assert trainable(load_scalar(with_(trainable="head"))) == {"score.weight"}
    names = trainable(load_policy(with_(trainable="last_layers", last_layers=1)))
    assert "model.norm.weight" in names
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"1"}
    assert "model.embed_tokens.weight" not in names
    lora = trainable(load_policy(with_(adapter=LoraConfig(rank=2))))
    assert lora and all("lora_" in name for name in lora)
    scalar = trainable(load_scalar(with_(adapter=LoraConfig(rank=2))))
    assert {name for name in scalar if "lora_" not in name} == {"base_model.model.score.modules_to_save.default.weight"}
    with pytest.raises(ConfigError, match="shares it with its embeddings"):
        load_policy(with_(trainable="head"))
    with pytest.raises(ConfigError, match="at most 2"):
        load_policy(with_(trainable="last_layers", last_layers=3))
    with pytest.raises(ValidationError):
        with_(trainable="last_layers")
    with pytest.raises(ValidationError):
        with_(trainable="head", adapter=LoraConfig())


SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)), "embed_tokens"),
        (MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)), "sliding_attention"),
        (Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)), "sliding_attention"),
    ],
    ids=["gpt2", "mistral-window", "gemma2"],
)
def test_other_architectures_are_refused(model: torch.nn.Module, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        check_architecture(model, "test")


def test_padding_token_needs_a_spare_special_token(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    assert padding_token(tiny, config) == config.pad_token_id
    config.pad_token_id = None
    assert padding_token(tiny, config) == 0
