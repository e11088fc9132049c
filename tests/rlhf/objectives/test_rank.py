from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rlhf.errors import DataError
from rlhf.objectives.base import ModelOutputs, TokenSignals
from rlhf.objectives.config import RankConfig
from rlhf.objectives.rank import RankObjective
from rlhf.types import TrainGroup
from tests.rlhf.objectives.hand import batch_of, means, run

NAN = math.nan


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loss_of(config: RankConfig, scores: list[float], ranks: list[float], *lengths: tuple[int, ...]):
    outputs = ModelOutputs(sequence_scores=torch.tensor(scores, requires_grad=True))
    return run(RankObjective(config), batch_of(*lengths), outputs, ranks=torch.tensor(ranks))


def test_log_sigmoid_by_hand():
    result = loss_of(RankConfig(), [2.0, 0.5], [1.0, 2.0], (1, 1))
    assert result.loss.item() == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-6)
    assert means(result) == pytest.approx(
        {"rank_loss": result.loss.item(), "pair_accuracy": 1.0, "margin": 1.5, "score": 1.25}, rel=1e-6
    )


def test_sigmoid_variant_by_hand():
    assert loss_of(RankConfig(variant="sigmoid"), [2.0, 0.5], [2.0, 1.0], (1, 1)).loss.item() == pytest.approx(
        -sigmoid(-1.5), rel=1e-6
    )


def test_margin_is_asked_for_on_top():
    found = loss_of(RankConfig(margin=0.5), [2.0, 0.5], [1.0, 2.0], (1, 1)).loss.item()
    assert found == pytest.approx(-math.log(sigmoid(1.0)), rel=1e-6)


def test_mean_over_a_prompts_pairs_then_over_prompts():
    # The first prompt has three pairs and the second one: both prompts weigh the same.
    scores, ranks = [1.0, 2.0, 4.0, 0.3, 0.1], [3.0, 2.0, 1.0, 1.0, 2.0]
    first = np.mean([-math.log(sigmoid(d)) for d in (1.0, 3.0, 2.0)])
    second = -math.log(sigmoid(0.2))
    assert loss_of(RankConfig(), scores, ranks, (1, 1, 1), (1, 1)).loss.item() == pytest.approx((first + second) / 2)


def test_ties_and_missing_ranks_are_left_out():
    result = loss_of(RankConfig(), [1.0, 5.0, 3.0, 100.0], [1.0, 1.0, 2.0, NAN], (1, 1, 1, 1))
    expected = np.mean([-math.log(sigmoid(-2.0)), -math.log(sigmoid(2.0))])
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert means(result)["pair_accuracy"] == 0.5


def test_equal_scores_are_half_right():
    assert means(loss_of(RankConfig(), [1.0, 1.0], [1.0, 2.0], (1, 1)))["pair_accuracy"] == 0.5


def test_centring_by_hand():
    scores, ranks = [2.0, 1.0, 7.0, 5.0, 5.0], [1.0, 2.0, NAN, 1.0, 1.0]
    plain = loss_of(RankConfig(), scores, ranks, (1, 1, 1), (1, 1)).loss.item()
    centred = loss_of(RankConfig(centring=0.1), scores, ranks, (1, 1, 1), (1, 1)).loss.item()
    # Only ranked siblings of prompts with a pair: mean 1.5. The step counts two prompts here.
    assert centred - plain == pytest.approx(0.1 * 1.5**2 / 2, rel=1e-5)


def test_a_micro_batch_without_a_pair_gives_zero_with_a_graph():
    outputs = ModelOutputs(sequence_scores=torch.tensor([1.0, 2.0], requires_grad=True))
    result = run(RankObjective(RankConfig(centring=0.1)), batch_of((1, 1)), outputs, ranks=torch.tensor([1.0, 1.0]))
    result.loss.backward()
    assert result.loss.item() == 0 and outputs.sequence_scores.grad.tolist() == [0.0, 0.0]
    assert float(result.metrics["pair_accuracy"][1]) == 0


def test_counts_leave_out_what_has_no_pair():
    ids = np.array([1, 2], np.int32)

    def group(*ranks: float) -> TrainGroup:
        return TrainGroup("x", ids, (ids,) * len(ranks), ranks=ranks)

    counts = RankObjective(RankConfig()).count([group(1, 2, NAN), group(1, 1, 1), group(NAN, 1), group(2, 1)])
    assert (counts.groups, counts.sequences, counts.tokens) == (2, 4, 8)


def test_an_unranked_group_is_refused_unless_it_is_a_pair():
    ids = np.array([1], np.int32)
    objective = RankObjective(RankConfig())
    assert objective.count([TrainGroup("pair", ids, (ids, ids))]).groups == 1
    with pytest.raises(DataError, match="prompt triple: found 3 completions without ranks"):
        objective.count([TrainGroup("triple", ids, (ids,) * 3)])


@pytest.mark.parametrize("variant", ["log_sigmoid", "sigmoid"])
def test_values_and_gradients_in_float64(variant):
    torch.manual_seed(0)
    batch, ranks = batch_of((1, 1, 1, 1), (1, 1, 1)), torch.tensor([1.0, 2.0, 2.0, NAN, 3.0, 1.0, 2.0])
    objective = RankObjective(RankConfig(variant=variant, margin=0.2, centring=0.3))
    scores = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def loss(s):
        return run(objective, batch, ModelOutputs(sequence_scores=s), ranks=ranks).loss

    assert torch.autograd.gradcheck(loss, (scores,))
    expected, s, r = 0.0, scores.tolist(), ranks.tolist()
    for members in ([0, 1, 2, 3], [4, 5, 6]):
        gaps = [s[i] - s[j] - 0.2 for i, j in itertools.permutations(members, 2) if r[i] < r[j]]
        per_pair = [-math.log(sigmoid(d)) if variant == "log_sigmoid" else -sigmoid(d) for d in gaps]
        ranked = [s[i] for i in members if not math.isnan(r[i])]
        expected += (np.mean(per_pair) + 0.3 * np.mean(ranked) ** 2) / 2
    assert loss(scores).item() == pytest.approx(expected, rel=1e-6)


def test_ranks_of_a_bare_pair_put_the_first_on_top():
    ids = np.array([1], np.int32)
    groups = [TrainGroup("a", ids, (ids, ids)), TrainGroup("b", ids, (ids, ids), ranks=(2.0, 1.0))]
    assert TokenSignals.from_groups(groups, batch_of((1, 1), (1, 1))).ranks.tolist() == [1.0, 2.0, 2.0, 1.0]
