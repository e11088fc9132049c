from __future__ import annotations

import math
import statistics

import pytest
import torch

from rlhf.maths.advantages import generalised_advantages, group_normalised, leave_one_out, whiten

NAN = math.nan


def test_group_normalised_by_hand():
    scores, groups = torch.tensor([1.0, 2.0, 6.0, 5.0, 7.0]), torch.tensor([0, 0, 0, 1, 1])
    advantages, usable = group_normalised(scores, groups, 2, epsilon=0.0)
    deviation = statistics.stdev([1, 2, 6])
    expected = [-2 / deviation, -1 / deviation, 3 / deviation, -1 / math.sqrt(2), 1 / math.sqrt(2)]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    assert usable.all()


def test_without_scale_the_mean_is_all_that_is_taken_off():
    advantages, _ = group_normalised(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.int64), 1, scale=False)
    assert advantages.tolist() == [-2.0, -1.0, 3.0]


@pytest.mark.parametrize("function", [group_normalised, leave_one_out])
def test_missing_scores_take_part_in_nothing(function):
    scores, groups = torch.tensor([1.0, NAN, 5.0, 3.0]), torch.zeros(4, dtype=torch.int64)
    advantages, usable = function(scores, groups, 1)
    alone, _ = function(scores[[0, 2, 3]], groups[:3], 1)
    assert usable.tolist() == [True, False, True, True]
    assert advantages[1] == 0
    torch.testing.assert_close(advantages[[0, 2, 3]], alone)


@pytest.mark.parametrize("function", [group_normalised, leave_one_out])
def test_a_group_with_fewer_than_two_scores_has_no_advantage(function):
    scores, groups = torch.tensor([1.0, NAN, NAN, NAN, 2.0, 4.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    advantages, usable = function(scores, groups, 3)
    assert usable.tolist() == [False, False, False, False, True, True]
    assert advantages[:4].tolist() == [0.0] * 4 and advantages.isfinite().all()


def test_equal_scores_are_usable_and_give_zero():
    advantages, usable = group_normalised(torch.full((3,), 0.7), torch.zeros(3, dtype=torch.int64), 1)
    assert usable.all()
    torch.testing.assert_close(advantages, torch.zeros(3), atol=1e-2, rtol=0)


def test_leave_one_out_is_the_score_less_the_mean_of_the_others():
    values = [1.0, 2.0, 6.0, 9.0]
    advantages, _ = leave_one_out(torch.tensor(values), torch.zeros(4, dtype=torch.int64), 1)
    expected = [r - statistics.mean(values[:i] + values[i + 1 :]) for i, r in enumerate(values)]
    torch.testing.assert_close(advantages, torch.tensor(expected))


@pytest.mark.parametrize("function", [group_normalised, leave_one_out])
def test_order_of_siblings_does_not_matter(function):
    torch.manual_seed(0)
    scores, groups, order = torch.randn(8), torch.arange(8) // 4, torch.tensor([5, 2, 0, 7, 1, 3, 6, 4])
    advantages, _ = function(scores, groups, 2)
    shuffled, _ = function(scores[order], groups[order], 2)
    torch.testing.assert_close(shuffled, advantages[order])


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    advantages, returns = generalised_advantages(
        rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=0.9, lam=0.8
    )
    last = 1.0 - 0.25
    first = 0.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.8 * last
    torch.testing.assert_close(advantages, torch.tensor([[first, last]]))
    torch.testing.assert_close(returns, torch.tensor([[first + 0.5, 1.0]]))


def test_gae_with_lam_one_is_the_discounted_return_less_the_value():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    _, returns = generalised_advantages(rewards, values, torch.ones(3, 6, dtype=torch.bool), gamma=0.9, lam=1.0)
    expected = sum(rewards[:, 2 + k] * 0.9**k for k in range(4))
    torch.testing.assert_close(returns[:, 2], expected)


def test_gae_ignores_padding_whatever_it_holds():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    mask = torch.arange(5)[None] < torch.tensor([[5], [2]])
    rewards[1, 2:], values[1, 2:] = NAN, 1e9
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=0.99, lam=0.95)
    alone, _ = generalised_advantages(rewards[1:, :2], values[1:, :2], mask[1:, :2], gamma=0.99, lam=0.95)
    torch.testing.assert_close(advantages[1:, :2], alone)
    assert (advantages[1, 2:] == 0).all() and (returns[1, 2:] == 0).all()


def test_whitening_gives_mean_zero_and_variance_one():
    torch.manual_seed(0)
    values, mask = torch.randn(4, 6) * 3 + 1e4, torch.rand(4, 6) > 0.3
    values[~mask] = NAN
    whitened = whiten(values, mask, lambda x: x)
    assert whitened[mask].mean().abs() < 1e-3
    assert whitened[mask].std().item() == pytest.approx(1.0, abs=1e-3)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_fewer_than_two_values_gives_zero(count):
    mask = torch.arange(3) < count
    assert whiten(torch.tensor([5.0, 6.0, 7.0]), mask, lambda x: x).tolist() == [0.0, 0.0, 0.0]
