from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
