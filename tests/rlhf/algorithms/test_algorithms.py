from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from rlhf.algorithms.build import build_algorithm
from rlhf.algorithms.config import AlgorithmConfig, GrpoConfig, PpoConfig, RewardKlConfig, RlooConfig
from rlhf.errors import DataError
from rlhf.maths.packing import pack
from rlhf.objectives.base import TokenSignals
from rlhf.objectives.config import KlConfig, PolicyConfig
from rlhf.types import TrainGroup
from tests.rlhf.objectives.hand import batch_of, logs
from tests.rlhf.objectives.steps import ThreadSum, make_groups

NAN = math.nan


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def signals_of(config, raw: TokenSignals, *lengths: tuple[int, ...]) -> TokenSignals:
    return build_algorithm(config).signals(batch_of(*lengths), raw, alone)


def test_grpo_by_hand():
    signals = signals_of(GrpoConfig(), TokenSignals(scores=torch.tensor([1.0, 3.0])), (2, 1))
    expected = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(signals.advantages, torch.tensor([[-expected, -expected], [expected, 0.0]]))
    assert signals.mask.tolist() == [[True, True], [True, False]]


def test_dr_grpo_does_not_scale():
    signals = signals_of(GrpoConfig(scale_by_std=False), TokenSignals(scores=torch.tensor([1.0, 3.0])), (1, 1))
    assert signals.advantages.tolist() == [[-1.0], [1.0]]


def test_rloo_by_hand():
    signals = signals_of(RlooConfig(), TokenSignals(scores=torch.tensor([1.0, 3.0, 8.0])), (1, 1, 1))
    assert signals.advantages[:, 0].tolist() == pytest.approx([1 - 5.5, 3 - 4.5, 8 - 2.0])


@pytest.mark.parametrize("config", [GrpoConfig(), RlooConfig()])
def test_a_group_with_one_score_is_left_out_whole(config):
    raw = TokenSignals(scores=torch.tensor([1.0, NAN, 2.0, 4.0, NAN]))
    signals = signals_of(config, raw, (2, 2), (1, 2, 2))
    assert signals.mask.any(-1).tolist() == [False, False, True, True, False]
    assert signals.advantages.isfinite().all()


def test_ppo_keeps_a_sequence_whose_sibling_has_no_score():
    raw = TokenSignals(scores=torch.tensor([1.0, NAN]), old_values=torch.zeros(2, 2))
    signals = signals_of(PpoConfig(whiten_advantages=False), raw, (2, 2))
    assert signals.mask.any(-1).tolist() == [True, False]
    assert signals.advantages.isfinite().all() and signals.returns.isfinite().all()


def test_ppo_by_hand():
    config = PpoConfig(gamma=0.9, lam=0.5, whiten_advantages=False, reward_kl=RewardKlConfig(coefficient=0.1))
    raw = TokenSignals(
        scores=torch.tensor([2.0]),
        old_values=torch.tensor([[0.5, 1.0]]),
        old_log_probs=logs([[0.4, 0.2]]),
        reference_log_probs=logs([[0.2, 0.4]]),
    )
    signals = signals_of(config, raw, (2,))
    first, last = -0.1 * math.log(2), 2.0 + 0.1 * math.log(2)
    late = last - 1.0
    early = first + 0.9 * 1.0 - 0.5 + 0.9 * 0.5 * late
    torch.testing.assert_close(signals.advantages, torch.tensor([[early, late]]))
    torch.testing.assert_close(signals.returns, torch.tensor([[early + 0.5, late + 1.0]]))


@pytest.mark.parametrize("config", [GrpoConfig, RlooConfig])
def test_kl_in_the_reward_is_taken_off_the_score(config):
    start, reference = logs([[0.4, 0.2], [0.1, 0.1]]), logs([[0.2, 0.2], [0.1, 0.4]])
    raw = TokenSignals(scores=torch.tensor([1.0, 1.0]), behaviour_log_probs=start, reference_log_probs=reference)
    found = signals_of(config(reward_kl=RewardKlConfig(coefficient=0.5)), raw, (2, 1))
    # The second sibling's last place is padding: its KL of log 4 must not count.
    scores = torch.tensor([1.0 - 0.5 * math.log(2), 1.0])
    expected = signals_of(config(), TokenSignals(scores=scores), (2, 1))
    torch.testing.assert_close(found.advantages, expected.advantages)


def test_kl_in_the_reward_prefers_the_learners_own_log_probs():
    raw = TokenSignals(
        scores=torch.tensor([0.0, 0.0]),
        old_log_probs=logs([[0.4], [0.4]]),
        behaviour_log_probs=logs([[0.9], [0.1]]),
        reference_log_probs=logs([[0.4], [0.4]]),
    )
    found = signals_of(GrpoConfig(reward_kl=RewardKlConfig(coefficient=1.0)), raw, (1, 1))
    assert found.advantages.tolist() == [[0.0], [0.0]]


def test_tokens_that_the_policy_did_not_choose_cost_no_kl():
    ids = np.array([1, 2], np.int32)
    group = TrainGroup("a", ids, (ids, ids), loss_masks=(np.array([True, False]),) * 2)
    raw = TokenSignals(
        scores=torch.tensor([1.0, 1.0]),
        old_log_probs=logs([[0.4, 0.9], [0.4, 0.1]]),
        reference_log_probs=logs([[0.4, 0.1], [0.4, 0.1]]),
    )
    algorithm = build_algorithm(GrpoConfig(reward_kl=RewardKlConfig(coefficient=1.0)))
    assert (algorithm.signals(pack([group], pad_id=0), raw, alone).advantages == 0).all()


def test_whitening_is_over_all_ranks():
    import threading

    groups, algorithm = make_groups(), build_algorithm(PpoConfig())
    reducer, found = ThreadSum(2), {}

    def work(rank: int, mine: list[TrainGroup]) -> None:
        batch = pack(mine, pad_id=0)
        signals = algorithm.signals(batch, TokenSignals.from_groups(mine, batch), reducer.of_rank(rank))
        found[rank] = signals.advantages[signals.mask]

    parts = (groups[:2], groups[2:])
    threads = [threading.Thread(target=work, args=(rank, mine)) for rank, mine in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = torch.cat([found[0], found[1]])
    assert together.mean().abs() < 1e-6 and together.std().item() == pytest.approx(1.0, abs=1e-5)
    assert found[0].mean().abs() > 1e-3


def test_what_is_needed_is_declared():
    in_loss = GrpoConfig(policy=PolicyConfig(kl=KlConfig(coefficient=0.1)))
    in_reward = PpoConfig(reward_kl=RewardKlConfig(coefficient=0.1))
    assert not build_algorithm(GrpoConfig()).needs_reference
    assert build_algorithm(in_loss).needs_reference and build_algorithm(in_reward).needs_reference
    assert build_algorithm(in_reward).needs_critic and not build_algorithm(in_loss).needs_critic
    assert build_algorithm(in_loss).value_objective() is None
    assert build_algorithm(in_reward).value_objective().head == "scalar"
    assert build_algorithm(in_loss).policy_objective().needs_reference


@pytest.mark.parametrize(
    ("config", "missing", "message"),
    [
        (GrpoConfig(), "scores", "algorithm grpo: found no scores"),
        (PpoConfig(), "old_values", "algorithm ppo: found no old_values"),
        (RlooConfig(reward_kl=RewardKlConfig(coefficient=1.0)), "reference_log_probs", "found no reference_log_probs"),
        (PpoConfig(reward_kl=RewardKlConfig(coefficient=1.0)), "behaviour_log_probs", "found no old_log_probs or"),
    ],
)
def test_what_is_missing_is_named(config, missing, message):
    groups = make_groups()
    batch = pack(groups, pad_id=0)
    raw = replace(TokenSignals.from_groups(groups, batch), **{missing: None})
    with pytest.raises(DataError, match=message):
        build_algorithm(config).signals(batch, raw, alone)


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_every_name_builds_its_algorithm(name):
    config = TypeAdapter(AlgorithmConfig).validate_python({"name": name, "num_epochs": 2, "num_mini_batches": 4})
    algorithm = build_algorithm(config)
    assert type(algorithm).__name__.lower() == name
    assert (algorithm.num_epochs, algorithm.num_mini_batches) == (2, 4)


def test_a_penalty_in_the_reward_is_k1_unless_said_otherwise():
    config = TypeAdapter(AlgorithmConfig).validate_python({"name": "ppo", "reward_kl": {"coefficient": 0.05}})
    assert config.reward_kl.estimator == "k1"


def test_one_reward_for_two_models_needs_shared_log_probs():
    in_reward = RewardKlConfig(coefficient=0.1)
    assert build_algorithm(PpoConfig(reward_kl=in_reward)).shares_old_log_probs
    assert not build_algorithm(PpoConfig()).shares_old_log_probs
    for alone_config in (GrpoConfig(reward_kl=in_reward), RlooConfig(reward_kl=in_reward)):
        assert not build_algorithm(alone_config).shares_old_log_probs


def test_annotated_log_probs_of_the_start_reach_the_signals():
    groups = make_groups()
    start = [tuple(np.full(len(ids), -0.5, np.float32) for ids in group.completion_ids) for group in groups]
    groups = [replace(group, old_log_probs=values) for group, values in zip(groups, start, strict=True)]
    batch = pack(groups, pad_id=0)
    raw = TokenSignals.from_groups(groups, batch)
    assert raw.old_log_probs is not None
    assert (raw.old_log_probs[batch.length_mask] == -0.5).all() and (raw.old_log_probs[~batch.length_mask] == 0).all()
