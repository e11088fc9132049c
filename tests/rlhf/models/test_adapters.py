from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.maths.packing import pack
from rlhf.models.adapters import export_parameters, without_adapter
from rlhf.models.forward import language_outputs
from rlhf.models.load import load_policy, load_scalar
from rlhf.models.settings import LoraConfig, ModelConfig
from tests.rlhf.models.conftest import make_groups


@pytest.fixture
def adapted(tiny: Path) -> torch.nn.Module:
    model = load_policy(ModelConfig(path=str(tiny), dtype="float32", adapter=LoraConfig(rank=4))).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_without_adapter_is_the_model_before_it(tiny: Path, adapted: torch.nn.Module) -> None:
    plain = load_policy(ModelConfig(path=str(tiny), dtype="float32")).eval()
    batch = pack(make_groups(), pad_id=0)
    with torch.no_grad():
        reference = language_outputs(plain, batch).log_probs
        moved = language_outputs(adapted, batch).log_probs
        with without_adapter(adapted):
            off = language_outputs(adapted, batch).log_probs
        with without_adapter(plain):
            same = language_outputs(plain, batch).log_probs
    assert torch.equal(off, reference) and torch.equal(same, reference)
    assert (moved - reference).abs().max() > 1e-3


def test_merged_export_computes_what_the_adapted_model_computes(tiny: Path, adapted: torch.nn.Module) -> None:
    plain = load_policy(ModelConfig(path=str(tiny), dtype="float32")).eval()
    exported = export_parameters(adapted)
    wanted = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    assert {name: shape for name, (shape, _, _) in exported.items()} == wanted
    plain.load_state_dict({name: compute() for name, (_, _, compute) in exported.items()}, strict=False)
    batch = pack(make_groups(), pad_id=0)
    with torch.no_grad():
        torch.testing.assert_close(
            language_outputs(plain, batch).log_probs, language_outputs(adapted, batch).log_probs, atol=1e-4, rtol=0
        )


def test_tied_embeddings_leave_once(tiny: Path) -> None:
    assert "lm_head.weight" not in export_parameters(load_policy(ModelConfig(path=str(tiny))))


def test_scalar_head_leaves_under_its_plain_name(tiny: Path) -> None:
    model = load_scalar(ModelConfig(path=str(tiny), dtype="float32", adapter=LoraConfig(rank=4)))
    plain = load_scalar(ModelConfig(path=str(tiny), dtype="float32"))
    assert set(export_parameters(model)) == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize("targets", [("query",), ("q_proj", "query"), ("embed_tokens",), ()], ids=str)
def test_targets_that_are_no_linear_layers_are_refused_with_those_that_there_are(tiny: Path, targets: tuple) -> None:
    with pytest.raises(ConfigError, match=r"model\.adapter\.targets.*down_proj, gate_proj, k_proj, o_proj, q_proj"):
        load_policy(ModelConfig(path=str(tiny), dtype="float32", adapter=LoraConfig(targets=targets)))


def test_a_target_may_be_one_layer_by_its_path(tiny: Path) -> None:
    config = LoraConfig(rank=2, targets=("layers.0.self_attn.q_proj", "v_proj"))
    model = load_policy(ModelConfig(path=str(tiny), dtype="float32", adapter=config))
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition("layers.")[2] for name in trained} == {
        *("0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"),
    }
