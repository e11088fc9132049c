from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from rlhf.errors import DataError
from rlhf.objectives.base import ModelOutputs
from rlhf.objectives.config import PreferenceConfig
from rlhf.objectives.preference import PreferenceObjective
from tests.rlhf.objectives.hand import batch_of, means, run

LOG_PROBS = torch.tensor([[-1.0, -2.0], [-4.0, -9.0]])
REFERENCE = torch.tensor([[-2.0, -2.5], [-3.0, -9.0]])
# Gains over the reference: 1.5 over two tokens, and -1 over one.
SIGNALS = {"reference_log_probs": REFERENCE, "ranks": torch.tensor([1.0, 2.0])}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def loss(**settings):
    return run(PreferenceObjective(PreferenceConfig(**settings)), batch_of((2, 1)), ModelOutputs(LOG_PROBS), **SIGNALS)


def test_dpo_by_hand():
    result = loss(beta=0.4)
    assert result.loss.item() == pytest.approx(-log_sigmoid(0.4 * 2.5), rel=1e-6)
    assert means(result) == pytest.approx(
        {
            "preference_loss": -log_sigmoid(1.0),
            "pair_accuracy": 1.0,
            "margin": 1.0,
            "better_reward": 0.6,
            "worse_reward": -0.4,
        },
        rel=1e-5,
    )


def test_label_smoothing_by_hand():
    expected = -0.8 * log_sigmoid(1.0) - 0.2 * log_sigmoid(-1.0)
    assert loss(beta=0.4, label_smoothing=0.2).loss.item() == pytest.approx(expected, rel=1e-6)


def test_ipo_by_hand():
    assert loss(variant="ipo", beta=0.5).loss.item() == pytest.approx((2.5 - 1.0) ** 2, rel=1e-6)
    normalised = loss(variant="ipo", beta=0.5, length_normalised=True).loss.item()
    assert normalised == pytest.approx((0.75 + 1 - 1.0) ** 2, rel=1e-6)


def test_rankings_of_three_use_every_ordered_pair():
    log_probs, reference = torch.tensor([[-1.0], [-2.0], [-4.0]]), torch.zeros(3, 1)
    signals = {"reference_log_probs": reference, "ranks": torch.tensor([1.0, 1.0, 2.0])}
    objective = PreferenceObjective(PreferenceConfig(beta=1.0))
    found = run(objective, batch_of((1, 1, 1)), ModelOutputs(log_probs), **signals).loss.item()
    assert found == pytest.approx(-(log_sigmoid(3.0) + log_sigmoid(2.0)) / 2, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"variant": "ipo", "length_normalised": True}])
def test_gradients_in_float64(settings):
    torch.manual_seed(0)
    batch = batch_of((3, 2), (1, 4))
    signals = {
        "reference_log_probs": torch.randn(batch.mask.shape, dtype=torch.float64),
        "ranks": torch.tensor([1.0, 2.0, 2.0, 1.0]),
    }
    objective = PreferenceObjective(PreferenceConfig(**settings))
    log_probs = torch.randn(batch.mask.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run(objective, batch, ModelOutputs(x), **signals).loss, (log_probs,))


def test_the_reference_is_required():
    with pytest.raises(DataError, match="no reference_log_probs"):
        run(PreferenceObjective(PreferenceConfig()), batch_of((2, 1)), ModelOutputs(LOG_PROBS), ranks=SIGNALS["ranks"])


def test_smoothing_is_refused_where_it_would_do_nothing():
    with pytest.raises(ValidationError, match="label_smoothing goes with"):
        PreferenceConfig(variant="ipo", label_smoothing=0.1)
