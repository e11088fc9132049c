from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.maths.packing import pack
from rlhf.objectives.base import ModelOutputs, TokenSignals
from rlhf.objectives.config import SupervisedConfig
from rlhf.objectives.supervised import SupervisedObjective
from rlhf.types import TrainGroup
from tests.rlhf.objectives.hand import batch_of, means, run

LOG_PROBS = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, -9.0, -9.0]])


@pytest.mark.parametrize(("how", "expected"), [("token_mean", 11 / 4), ("sequence_mean", (2 + 5) / 2)])
def test_negative_log_likelihood_by_hand(how, expected):
    objective = SupervisedObjective(SupervisedConfig(aggregation=how))
    result = run(objective, batch_of((3,), (1,)), ModelOutputs(LOG_PROBS))
    assert result.loss.item() == pytest.approx(expected)
    assert means(result)["nll"] == pytest.approx(11 / 4)


def test_tokens_outside_the_loss_mask_give_nothing():
    mask = (np.array([False, True, True]),)
    group = TrainGroup("a", np.array([1], np.int32), (np.array([2, 3, 4], np.int32),), loss_masks=mask)
    objective, log_probs = SupervisedObjective(SupervisedConfig()), LOG_PROBS[:1].clone().requires_grad_()
    counts = objective.count([group])
    result = objective.loss(ModelOutputs(log_probs), pack([group], pad_id=0), TokenSignals(), counts)
    result.loss.backward()
    assert (counts.tokens, counts.sequences, counts.groups) == (2, 1, 1)
    assert result.loss.item() == pytest.approx(2.5)
    assert log_probs.grad.tolist() == [[0.0, -0.5, -0.5]]
