"""Attention on prompts and completions apart equals the plain formula under the mask of the whole row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlhf.maths.packing import pack
from rlhf.models.attention import SHARED_PROMPT, SiblingLayout, shared_prompt_attention
from rlhf.models.forward import hidden_states
from rlhf.models.load import load_policy
from rlhf.models.settings import LoraConfig, ModelConfig
from rlhf.types import TrainGroup
from tests.rlhf.models.conftest import make_groups

HEADS, KEY_HEADS, WIDTH = 6, 2, 4

shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=4
).filter(lambda groups: any(len(completions) > 1 for _, completions in groups))


def groups_of(lengths: list[tuple[int, list[int]]]) -> list[TrainGroup]:
    return [
        TrainGroup(f"g{i}", np.ones(prompt, np.int32), tuple(np.ones(n, np.int32) for n in completions))
        for i, (prompt, completions) in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(lengths=shapes, multiple_of=st.sampled_from([1, 8]), seed=st.integers(0, 999))
def test_outputs_and_gradients_equal_those_of_the_masked_square(lengths, multiple_of, seed):
    batch = pack(groups_of(lengths), pad_id=0, multiple_of=multiple_of)
    rows, length = batch.input_ids.shape
    draw = torch.Generator().manual_seed(seed)

    def leaf(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, length, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()

    query, key, value = leaf(HEADS), leaf(KEY_HEADS), leaf(KEY_HEADS)
    layout = SiblingLayout.of(batch, torch.float64)
    ours, weights = shared_prompt_attention(nn.Module(), query, key, value, None, siblings=layout, scaling=0.7)
    assert weights is None and ours.shape == (rows, length, HEADS, WIDTH)

    spread_key, spread_value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    products = query @ spread_key.transpose(-1, -2) * 0.7 + batch.attention_mask(torch.float64)
    expected = (products.softmax(-1) @ spread_value).transpose(1, 2)

    real = batch.segment_ids >= 0
    torch.testing.assert_close(ours[real], expected[real], atol=1e-12, rtol=0)
    assert torch.isfinite(ours).all(), "padding may hold anything finite"
    upstream = torch.randn(expected[real].shape, generator=draw, dtype=torch.float64)
    found = torch.autograd.grad((ours[real] * upstream).sum(), (query, key, value), retain_graph=True)
    wanted = torch.autograd.grad((expected[real] * upstream).sum(), (query, key, value))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("settings_of_model", [{}, {"gradient_checkpointing": True}, {"adapter": LoraConfig(rank=2)}])
def test_a_model_gives_the_same_hidden_states_and_gradients_as_with_the_plain_formula(tiny: Path, settings_of_model):
    batch = pack(make_groups(3, 3), pad_id=0)
    found = {}
    for kind in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = load_policy(ModelConfig(path=str(tiny), dtype="float32", attention=kind, **settings_of_model)).train()
        hidden = hidden_states(model, batch)[batch.segment_ids >= 0]
        hidden.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found[kind] = [hidden, *gradients]
    assert len(found["sdpa"]) == len(found["eager"]) > 1
    for ours, plain in zip(found["sdpa"], found["eager"], strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-4)


def test_saved_models_name_no_attention_that_other_programs_lack(tiny: Path, tmp_path: Path):
    model = load_policy(ModelConfig(path=str(tiny)))
    assert model.config._attn_implementation == SHARED_PROMPT
    model.save_pretrained(tmp_path)
    assert SHARED_PROMPT not in (tmp_path / "config.json").read_text(encoding="utf-8")
