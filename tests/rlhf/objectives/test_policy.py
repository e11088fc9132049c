from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from rlhf.errors import DataError
from rlhf.maths.ops import kl_estimate
from rlhf.objectives.base import ModelOutputs
from rlhf.objectives.config import KlConfig, PolicyConfig
from rlhf.objectives.policy import PolicyObjective
from tests.rlhf.objectives.hand import batch_of, logs, means, run

ONES = [[1.0, 1.0]]


def policy(**settings) -> PolicyObjective:
    return PolicyObjective(PolicyConfig(**settings))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.1, 2.0, -2.2, 0.0),
        (1.5, 2.0, -2.4, 1.0),  # clipped above at 1.2
        (0.5, 2.0, -1.0, 0.0),  # a bad move for a good token is not clipped
        (0.5, -2.0, 1.6, 1.0),  # clipped below at 0.8
        (1.5, -2.0, 3.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, expected, clipped):
    batch = batch_of((1,))
    log_probs = logs([[0.5 * ratio]]).requires_grad_()
    result = run(
        policy(), batch, ModelOutputs(log_probs), old_log_probs=logs([[0.5]]), advantages=torch.tensor([[advantage]])
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert means(result)["clip_fraction"] == clipped
    assert means(result)["ratio"] == pytest.approx(ratio, rel=1e-5)
    assert (log_probs.grad.item() == 0) == bool(clipped)


def test_low_and_high_clips_are_apart():
    batch = batch_of((2,))
    outputs = ModelOutputs(logs([[0.4, 0.1]]))
    signals = {"old_log_probs": logs([[0.2, 0.2]]), "advantages": torch.tensor([[1.0, -1.0]])}
    result = run(policy(clip_low=0.1, clip_high=0.3), batch, outputs, **signals)
    assert result.loss.item() == pytest.approx((-1.3 + 0.9) / 2, rel=1e-5)


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_is_the_advantage():
    batch = batch_of((2,))
    log_probs = logs([[0.3, 0.6]]).requires_grad_()
    result = run(policy(), batch, ModelOutputs(log_probs), advantages=torch.tensor([[3.0, -1.0]]))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-1.0)
    assert log_probs.grad.tolist() == [[-1.5, 0.5]]
    assert means(result)["update_kl"] == 0


def test_truncated_importance_weight_by_hand():
    batch = batch_of((2,))
    outputs = ModelOutputs(logs([[0.4, 0.4]]))
    signals = {"advantages": torch.tensor(ONES), "behaviour_log_probs": logs([[0.1, 0.5]])}
    result = run(policy(importance_cap=2.0), batch, outputs, **signals)
    assert result.loss.item() == pytest.approx(-(2.0 + 0.8) / 2, rel=1e-5)
    found = means(result)
    assert found["importance_capped"] == 0.5
    assert found["behaviour_ratio"] == pytest.approx((4.0 + 0.8) / 2, rel=1e-5)
    assert found["behaviour_mismatch"] == pytest.approx((math.log(4) + math.log(5 / 4)) / 2, rel=1e-5)


def test_mismatch_is_reported_without_correction():
    signals = {"advantages": torch.tensor(ONES), "behaviour_log_probs": logs([[0.1, 0.5]])}
    result = run(policy(), batch_of((2,)), ModelOutputs(logs([[0.4, 0.4]])), **signals)
    assert result.loss.item() == pytest.approx(-1.0)
    assert means(result)["behaviour_ratio"] == pytest.approx(2.4, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss(estimator):
    log_probs, reference = logs([[0.4, 0.2]]), logs([[0.2, 0.3]])
    signals = {"advantages": torch.zeros(1, 2), "reference_log_probs": reference}
    objective = policy(kl=KlConfig(coefficient=0.5, estimator=estimator))
    result = run(objective, batch_of((2,)), ModelOutputs(log_probs), **signals)
    expected = kl_estimate(log_probs, reference, estimator).mean().item()
    assert objective.needs_reference
    assert result.loss.item() == pytest.approx(0.5 * expected, rel=1e-5)
    assert means(result)["kl"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_gradient_of_the_kl_loss_is_that_of_the_kl(estimator):
    torch.manual_seed(0)
    vocabulary = 6
    logits, reference = torch.randn(vocabulary, requires_grad=True), torch.randn(vocabulary).log_softmax(-1)
    policy_log_probs = logits.log_softmax(-1)
    exact = torch.autograd.grad((policy_log_probs.exp() * (policy_log_probs - reference)).sum(), logits)[0]
    # One "sequence" per token of the vocabulary, each weighed by its probability: the expectation over samples.
    expected = torch.zeros(vocabulary)
    objective = policy(kl=KlConfig(coefficient=1.0, estimator=estimator))
    for token in range(vocabulary):
        log_probs = logits.log_softmax(-1)[token].reshape(1, 1)
        signals = {"advantages": torch.zeros(1, 1), "reference_log_probs": reference[token].reshape(1, 1)}
        loss = run(objective, batch_of((1,)), ModelOutputs(log_probs), **signals).loss
        expected += log_probs.detach().exp().item() * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(expected, exact, atol=1e-5, rtol=1e-4)


def test_a_reference_without_a_coefficient_is_only_reported():
    signals = {"advantages": torch.zeros(1, 2), "reference_log_probs": logs([[0.2, 0.3]])}
    result = run(policy(), batch_of((2,)), ModelOutputs(logs([[0.4, 0.2]])), **signals)
    assert result.loss.item() == 0 and means(result)["kl"] > 0


def test_entropy_bonus_by_hand():
    objective = policy(entropy_coefficient=0.1)
    outputs = ModelOutputs(logs([[0.4, 0.2]]), entropy=torch.tensor([[2.0, 1.0]]))
    result = run(objective, batch_of((2,)), outputs, advantages=torch.zeros(1, 2))
    assert objective.needs_entropy
    assert result.loss.item() == pytest.approx(-0.15)
    assert means(result)["entropy"] == pytest.approx(1.5)


def test_masked_sequences_give_nothing_even_if_they_are_nan():
    batch = batch_of((2, 2))
    log_probs = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0], [math.nan, math.nan]])
    mask = torch.tensor([[True, True], [False, False]])
    result = run(policy(), batch, ModelOutputs(log_probs), advantages=advantages, mask=mask)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-0.5)  # the denominators here still count both
    assert log_probs.grad[1].tolist() == [0.0, 0.0]
    assert all(math.isfinite(value) for value in means(result).values())


def test_gradients_in_float64():
    torch.manual_seed(0)
    batch = batch_of((3, 2), (4,))
    shape = batch.mask.shape
    signals = {
        "advantages": torch.randn(shape, dtype=torch.float64),
        "old_log_probs": torch.randn(shape, dtype=torch.float64) * 0.05 - 1,
        "reference_log_probs": torch.randn(shape, dtype=torch.float64) * 0.1 - 1,
        "behaviour_log_probs": torch.randn(shape, dtype=torch.float64) * 0.1 - 1,
    }
    objective = policy(kl=KlConfig(coefficient=0.3), entropy_coefficient=0.1, importance_cap=1.1)
    log_probs = (torch.randn(shape, dtype=torch.float64) * 0.05 - 1).requires_grad_()
    entropy = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, h: run(objective, batch, ModelOutputs(x, h), **signals).loss, (log_probs, entropy)
    )


@pytest.mark.parametrize(
    ("settings", "outputs", "signals", "message"),
    [
        ({}, ModelOutputs(), {}, "no log_probs"),
        ({}, ModelOutputs(logs(ONES)), {}, "no advantages"),
        (
            {"importance_cap": 2.0},
            ModelOutputs(logs(ONES)),
            {"advantages": torch.tensor(ONES)},
            "no behaviour_log_probs",
        ),
        ({"entropy_coefficient": 0.1}, ModelOutputs(logs(ONES)), {"advantages": torch.tensor(ONES)}, "no entropy"),
        (
            {"kl": KlConfig(coefficient=0.1)},
            ModelOutputs(logs(ONES)),
            {"advantages": torch.tensor(ONES)},
            "no reference_log_probs",
        ),
    ],
)
def test_what_is_missing_is_named(settings, outputs, signals, message):
    with pytest.raises(DataError, match=message):
        run(policy(**settings), batch_of((2,)), outputs, **signals)


@pytest.mark.parametrize("settings", [{"aggregation": "fixed_length"}, {"fixed_length": 8}])
def test_fixed_length_and_its_aggregation_go_together(settings):
    with pytest.raises(ValidationError, match="fixed_length goes with"):
        PolicyConfig(**settings)
