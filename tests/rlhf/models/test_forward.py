from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.maths.packing import pack, split_by_length
from rlhf.models.forward import language_outputs, scalar_outputs
from rlhf.models.load import check_architecture, load_policy, load_scalar
from rlhf.models.settings import ModelConfig
from tests.rlhf.models.conftest import make_groups
from tests.tiny import draw_head


def plain_log_probs(model: torch.nn.Module, group, temperature: float = 1.0) -> list[np.ndarray]:
    """One sequence at a time, through the model's own forward."""
    found = []
    for completion in group.completion_ids:
        ids = torch.tensor(np.concatenate([group.prompt_ids, completion]), dtype=torch.int64)[None]
        with torch.no_grad():
            logits = model(ids).logits[0].float() / temperature
        rows = logits[len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(completion, dtype=torch.int64)[:, None])[:, 0].numpy())
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_log_probs_equal_one_sequence_at_a_time(tiny: Path, attention: str) -> None:
    groups = make_groups()
    model = load_policy(ModelConfig(path=str(tiny), dtype="float32", attention=attention)).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    batch = pack(groups, pad_id=0, multiple_of=8)
    with torch.no_grad():
        outputs = language_outputs(model, batch, temperature=0.7)
    for group, arrays in zip(groups, split_by_length(outputs.log_probs, batch), strict=True):
        for ours, theirs in zip(arrays, plain_log_probs(plain, group, 0.7), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_greedy_log_probs_are_those_at_temperature_one(tiny: Path) -> None:
    """An engine that takes the likeliest token reports them so; a division by zero would make them NaN."""
    model = load_policy(ModelConfig(path=str(tiny), dtype="float32")).eval()
    batch = pack(make_groups(), pad_id=0)
    with torch.no_grad():
        greedy, plain = (language_outputs(model, batch, temperature=t).log_probs for t in (0.0, 1.0))
    torch.testing.assert_close(greedy, plain, rtol=0, atol=0)


SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
        MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
        Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_llama_like_architectures_run_packed(model: torch.nn.Module) -> None:
    check_architecture(model, "test")
    model.eval()
    groups = make_groups(vocabulary=60)
    batch = pack(groups, pad_id=0)
    with torch.no_grad():
        outputs = language_outputs(model, batch)
    for group, arrays in zip(groups, split_by_length(outputs.log_probs, batch), strict=True):
        for ours, theirs in zip(arrays, plain_log_probs(model, group), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_siblings_do_not_see_each_other(tiny: Path) -> None:
    model = draw_head(load_scalar(ModelConfig(path=str(tiny), dtype="float32"))).eval()
    batch = pack(make_groups(1), pad_id=0)
    changed = batch.input_ids.clone()
    changed[batch.segment_ids == 1] = 9
    other = pack(make_groups(1), pad_id=0)
    object.__setattr__(other, "input_ids", changed)
    with torch.no_grad():
        before = scalar_outputs(model, batch, per_token=False).sequence_scores
        after = scalar_outputs(model, other, per_token=False).sequence_scores
    assert before[0] != after[0]
    assert torch.equal(before[1:], after[1:])


def test_no_targets_at_all_gives_zeros_with_a_graph(tiny: Path) -> None:
    model = load_policy(ModelConfig(path=str(tiny), dtype="float32"))
    (group,) = make_groups(1, 2)
    empty = np.zeros(0, np.int32)
    batch = pack([type(group)(uid="e", prompt_ids=group.prompt_ids, completion_ids=(empty, empty))], pad_id=0)
    outputs = language_outputs(model, batch, need_entropy=True)
    assert outputs.log_probs.shape == (2, 1)
    assert not outputs.log_probs.any()
    outputs.log_probs.sum().backward()
