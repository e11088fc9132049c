"""The way a step is dealt out must not change it: every objective, every algorithm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.build import build_algorithm
from rlhf.algorithms.config import GrpoConfig, PpoConfig, RewardKlConfig, RlooConfig
from rlhf.objectives.build import build_objective
from rlhf.objectives.config import KlConfig, PolicyConfig, PreferenceConfig, RankConfig, SupervisedConfig
from tests.rlhf.objectives.steps import StepResult, make_groups, run_step

FULL = {"kl": KlConfig(coefficient=0.1), "entropy_coefficient": 0.01, "importance_cap": 1.2}
CASES = {
    "supervised": (build_objective(SupervisedConfig()), None),
    "supervised_sequences": (build_objective(SupervisedConfig(aggregation="sequence_mean")), None),
    "rank": (build_objective(RankConfig(margin=0.3, centring=0.05)), None),
    "rank_sigmoid": (build_objective(RankConfig(variant="sigmoid")), None),
    "dpo": (build_objective(PreferenceConfig(label_smoothing=0.1)), None),
    "ipo": (build_objective(PreferenceConfig(variant="ipo", length_normalised=True)), None),
}
for how in ("token_mean", "sequence_mean", "group_mean", "fixed_length"):
    policy = PolicyConfig(**FULL, aggregation=how, fixed_length=9 if how == "fixed_length" else None)
    grpo = build_algorithm(GrpoConfig(policy=policy))
    CASES[f"grpo_{how}"] = (grpo.policy_objective(), grpo)
rloo = build_algorithm(RlooConfig(reward_kl=RewardKlConfig(coefficient=0.1)))
ppo = build_algorithm(PpoConfig(policy=PolicyConfig(**FULL), reward_kl=RewardKlConfig(coefficient=0.05)))
CASES |= {"rloo": (rloo.policy_objective(), rloo), "ppo": (ppo.policy_objective(), ppo)}
CASES["ppo_value"] = (ppo.value_objective(), ppo)

WHOLE = [[[0, 1, 2, 3, 4]]]


def assert_same(found: StepResult, expected: StepResult) -> None:
    assert found.loss == pytest.approx(expected.loss, abs=2e-6)
    assert found.metrics == pytest.approx(expected.metrics, abs=2e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient, atol=2e-6, rtol=1e-4)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    objective, algorithm = CASES[request.param]
    return objective, algorithm, run_step(objective, make_groups(), WHOLE, algorithm)


def test_the_step_trains_something(case):
    _, _, whole = case
    assert np.isfinite(whole.loss) and any((gradient != 0).any() for gradient in whole.gradients.values())
    assert all(gradient.isfinite().all() for gradient in whole.gradients.values())


@pytest.mark.parametrize(
    "plan",
    [
        [[[0], [1], [2], [3], [4]]],
        [[[4, 2], [0, 1, 3]]],
        [[[0, 3]], [[1, 2, 4]]],
        [[[2], [3]], [[1, 4], [0]]],
        [[[4]], [[2], [0]], [[1], [3]]],
    ],
    ids=["one_by_one", "uneven", "two_ranks", "ranks_and_micro_batches", "three_ranks"],
)
def test_micro_batches_and_ranks_do_not_matter(case, plan):
    objective, algorithm, whole = case
    assert_same(run_step(objective, make_groups(), plan, algorithm), whole)


def test_padding_does_not_matter(case):
    objective, algorithm, whole = case
    assert_same(run_step(objective, make_groups(), [[[0, 4], [1], [2, 3]]], algorithm, multiple_of=32), whole)


def test_order_of_groups_does_not_matter(case):
    objective, algorithm, whole = case
    assert_same(run_step(objective, make_groups()[::-1], WHOLE, algorithm), whole)


def test_order_of_siblings_does_not_matter(case, monkeypatch):
    objective, algorithm, whole = case
    order = [2, 0, 3, 1]
    shuffled = [
        replace(
            group,
            **{
                name: tuple(getattr(group, name)[k] for k in order)
                for name in (
                    "completion_ids",
                    "ranks",
                    "scores",
                    "behaviour_log_probs",
                    "reference_log_probs",
                    "values",
                )
            },
            loss_masks=None if group.loss_masks is None else tuple(group.loss_masks[k] for k in order),
        )
        for group in make_groups()
    ]
    # The imagined model answers by sequence, so its leaves follow the siblings.
    from tests.rlhf.objectives import steps

    original = steps.Leaves.of(make_groups())

    def follow(_groups):
        per_token = {(uid, i): original.per_token[uid, k] for uid, _ in original.per_token for i, k in enumerate(order)}
        scores = {(uid, i): original.scores[uid, k] for uid, _ in original.scores for i, k in enumerate(order)}
        return steps.Leaves(per_token, scores)

    monkeypatch.setattr(steps.Leaves, "of", staticmethod(follow))
    found = run_step(objective, shuffled, WHOLE, algorithm)
    assert_same(StepResult(found.loss, found.metrics, original.gradients()), whole)


def test_missing_scores_and_masks_are_left_out_of_counts_and_signals_alike(case):
    objective, algorithm, _ = case
    if algorithm is None:
        return
    from rlhf.maths.packing import pack
    from rlhf.objectives.base import TokenSignals, trained_mask

    groups = make_groups()
    batch = pack(groups, pad_id=0)
    signals = algorithm.signals(batch, TokenSignals.from_groups(groups, batch), lambda x: x)
    mask, counts = trained_mask(batch, signals), objective.count(groups)
    trained = mask.any(-1)
    assert counts.tokens == mask.sum()
    assert counts.sequences == trained.sum()
    assert counts.groups == len(batch.group_index[trained].unique())
