from __future__ import annotations

import math

import pytest
import torch

from rlhf.maths.ops import group_sum, kl_estimate, masked_sum, token_log_probs


def test_masked_sums_ignore_what_is_masked_even_nan():
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 5.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert masked_sum(values, mask).item() == 12.0
    assert masked_sum(values, mask, -1).tolist() == [3.0, 9.0]
    assert masked_sum(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_masked_places_get_no_gradient():
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    masked_sum(values, torch.tensor([True, False, True])).backward()
    assert values.grad.tolist() == [1.0, 0.0, 1.0]


def test_group_sum_adds_by_index():
    assert group_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 3).tolist() == [1.0, 0.0, 6.0]


def test_log_probs_and_entropy_by_hand():
    # logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    log_probs, entropy = token_log_probs(logits, torch.tensor([1]), with_entropy=True)
    assert log_probs.item() == pytest.approx(math.log(2 / 8), abs=1e-6)
    expected = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert entropy.item() == pytest.approx(expected, abs=1e-6)


def test_temperature_divides_logits():
    logits = torch.tensor([[0.0, math.log(4.0)]])
    log_probs, _ = token_log_probs(logits, torch.tensor([1]), temperature=2.0)
    assert log_probs.item() == pytest.approx(math.log(2 / 3), abs=1e-6)


def test_entropy_is_only_computed_on_request():
    assert token_log_probs(torch.zeros(2, 3), torch.tensor([0, 1]))[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_float32_and_match_float64(dtype):
    torch.manual_seed(0)
    logits, targets = (torch.randn(37, 101) * 5).to(dtype), torch.randint(0, 101, (37,))
    log_probs, entropy = token_log_probs(logits, targets, temperature=0.7, with_entropy=True)
    exact = (logits.double() / 0.7).log_softmax(-1)
    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), exact.gather(-1, targets[:, None])[:, 0], atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=2e-5, rtol=0)


def test_chunks_do_not_change_values_or_gradients():
    torch.manual_seed(0)
    targets, weights = torch.randint(0, 11, (10,)), torch.randn(10)
    results = []
    for chunk_size in (1, 3, 10, 64):
        logits = torch.randn(10, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
        log_probs, entropy = token_log_probs(logits, targets, with_entropy=True, chunk_size=chunk_size)
        ((log_probs + 0.3 * entropy) * weights).sum().backward()
        results.append((log_probs.detach(), entropy.detach(), logits.grad))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_gradients_of_log_probs_and_entropy():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda z: token_log_probs(z, targets, temperature=1.7, with_entropy=True, chunk_size=2), (logits,)
    )
    assert torch.autograd.gradcheck(lambda z: token_log_probs(z, targets, chunk_size=2)[0], (logits,))


def test_forbidden_tokens_leave_values_and_gradients_finite():
    logits = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    log_probs, entropy = token_log_probs(logits, torch.tensor([1]), with_entropy=True)
    (log_probs + entropy).sum().backward()
    assert entropy.isfinite().all() and logits.grad.isfinite().all() and logits.grad[0, 2] == 0


def test_no_tokens_give_no_values():
    logits = torch.zeros(0, 5, requires_grad=True)
    log_probs, _ = token_log_probs(logits, torch.zeros(0, dtype=torch.int64))
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and logits.grad.shape == (0, 5)


def test_kl_estimates_by_hand():
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_estimate(policy, reference, "k1").item() == pytest.approx(math.log(2), abs=1e-6)
    assert kl_estimate(policy, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2, abs=1e-6)
    assert kl_estimate(policy, reference, "k3").item() == pytest.approx(0.5 - 1 + math.log(2), abs=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient_of_the_kl():
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    p = policy.detach().exp()
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(policy, reference, estimator)).sum(), exact)
    wanted = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    # Tokens are drawn, so the probabilities carry no gradient of their own.
    of_k2 = torch.autograd.grad((p * kl_estimate(policy, reference, "k2")).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(of_k2, wanted)
    of_k1 = torch.autograd.grad((p * kl_estimate(policy, reference, "k1")).sum(), logits)[0]
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1), atol=1e-12, rtol=0)


def test_k3_is_exact_near_zero_and_never_negative():
    differences = torch.linspace(-3, 3, 401)
    assert (kl_estimate(differences, torch.zeros(401), "k3") >= 0).all()
    assert kl_estimate(torch.tensor(1e-4), torch.tensor(0.0), "k3").item() == pytest.approx(5e-9, rel=0.05)
