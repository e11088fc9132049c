from __future__ import annotations

import math

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.maths.aggregate import token_weights, weighted_sum
from rlhf.objectives.base import Denominators

MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])
VALUES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 99.0, 99.0], [6.0, 99.0, 99.0, 99.0]])
GROUPS = torch.tensor([0, 0, 1])
COUNTS = Denominators(tokens=7.0, sequences=3.0, groups=2.0)


@pytest.mark.parametrize(
    ("how", "fixed_length", "expected"),
    [
        ("token_mean", None, 46 / 7),
        ("sequence_mean", None, (2.5 + 15 + 6) / 3),
        ("group_mean", None, (40 / 6 + 6) / 2),
        ("fixed_length", 4, (10 / 4 + 30 / 4 + 6 / 4) / 3),
    ],
)
def test_means_by_hand(how, fixed_length, expected):
    weights = token_weights(MASK, GROUPS, COUNTS, how, fixed_length)
    assert weighted_sum(VALUES, weights).item() == pytest.approx(expected, rel=1e-6)
    if how != "fixed_length":
        assert weights.sum().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("how", "fixed_length"), [("token_mean", None), ("sequence_mean", None), ("group_mean", None), ("fixed_length", 4)]
)
def test_parts_add_up_to_the_whole(how, fixed_length):
    whole = weighted_sum(VALUES, token_weights(MASK, GROUPS, COUNTS, how, fixed_length))
    first = weighted_sum(VALUES[:2], token_weights(MASK[:2], GROUPS[:2], COUNTS, how, fixed_length))
    second = weighted_sum(VALUES[2:, :1], token_weights(MASK[2:, :1], GROUPS[2:] - 1, COUNTS, how, fixed_length))
    torch.testing.assert_close(first + second, whole)


def test_masked_values_may_be_anything():
    values = VALUES.clone()
    values[~MASK] = math.nan
    values.requires_grad_()
    loss = weighted_sum(values, token_weights(MASK, GROUPS, COUNTS, "token_mean"))
    loss.backward()
    assert loss.item() == pytest.approx(46 / 7) and values.grad.isfinite().all()


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "group_mean"])
def test_a_step_with_nothing_to_train_on_gives_zero_with_a_graph(how):
    values = VALUES.clone().requires_grad_()
    weights = token_weights(torch.zeros_like(MASK), GROUPS, Denominators(0.0, 0.0, 0.0), how)
    loss = weighted_sum(values, weights)
    loss.backward()
    assert loss.item() == 0.0 and (values.grad == 0).all()


def test_fixed_length_needs_its_length():
    with pytest.raises(ConfigError, match="a length to divide by"):
        token_weights(MASK, GROUPS, COUNTS, "fixed_length")
