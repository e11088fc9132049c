from __future__ import annotations

import pytest
import torch

from rlhf.errors import DataError
from rlhf.objectives.base import ModelOutputs
from rlhf.objectives.config import ValueConfig
from rlhf.objectives.value import ValueObjective
from tests.rlhf.objectives.hand import batch_of, means, run


def test_squared_error_by_hand():
    outputs = ModelOutputs(token_values=torch.tensor([[1.0, 2.0], [3.0, 9.0]]))
    signals = {"returns": torch.tensor([[0.0, 4.0], [6.0, 9.0]])}
    result = run(ValueObjective(ValueConfig(clip=None)), batch_of((2, 1)), outputs, **signals)
    assert result.loss.item() == pytest.approx((1 + 4 + 9) / 3 / 2)
    found = means(result)
    assert found["value_error"] == pytest.approx(14 / 3)
    assert found["value"] == pytest.approx(2.0) and found["return"] == pytest.approx(10 / 3)
    assert found["value_loss"] == pytest.approx(result.loss.item())


def test_clipping_by_hand():
    # old 0: the value 1 is clipped to 0.2, whose error towards 2 is larger and has no gradient.
    values = torch.tensor([[1.0, 0.1]], requires_grad=True)
    signals = {"returns": torch.tensor([[2.0, 2.0]]), "old_values": torch.zeros(1, 2)}
    result = run(ValueObjective(ValueConfig(clip=0.2)), batch_of((2,)), ModelOutputs(token_values=values), **signals)
    result.loss.backward()
    assert result.loss.item() == pytest.approx((1.8**2 + 1.9**2) / 4)
    assert values.grad.tolist() == [[0.0, pytest.approx(-0.95)]]
    assert means(result)["value_clip_fraction"] == 0.5


def test_gradients_in_float64():
    torch.manual_seed(0)
    batch = batch_of((3, 2), (1,))
    signals = {name: torch.randn(batch.mask.shape, dtype=torch.float64) for name in ("returns", "old_values")}
    values = torch.randn(batch.mask.shape, dtype=torch.float64, requires_grad=True)
    objective = ValueObjective(ValueConfig(clip=0.5))
    assert torch.autograd.gradcheck(
        lambda v: run(objective, batch, ModelOutputs(token_values=v), **signals).loss, (values,)
    )


def test_clipping_needs_old_values():
    outputs = ModelOutputs(token_values=torch.zeros(1, 2))
    with pytest.raises(DataError, match="no old_values"):
        run(ValueObjective(ValueConfig()), batch_of((2,)), outputs, returns=torch.zeros(1, 2))
