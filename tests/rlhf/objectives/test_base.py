from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from rlhf.errors import DataError
from rlhf.maths.packing import pack
from rlhf.objectives.base import Denominators, TokenSignals, sequences_of_groups, usable_scores, usable_sequences
from rlhf.objectives.build import build_objective
from rlhf.objectives.config import ObjectiveConfig, PolicyConfig
from rlhf.objectives.policy import PolicyObjective
from tests.rlhf.objectives.steps import make_groups

NAN = math.nan


def test_denominators_add():
    assert Denominators(1.0, 2.0, 3.0) + Denominators(4.0, 5.0, 6.0) == Denominators(5.0, 7.0, 9.0)


@pytest.mark.parametrize(("scores", "expected"), [((1.0, NAN, 2.0), [1, 0, 1]), ((1.0, NAN), [0, 0]), ((NAN,), [0])])
def test_usable_scores_by_hand(scores, expected):
    assert [int(flag) for flag in usable_scores(scores, 2)] == expected
    groups = torch.zeros(len(scores), dtype=torch.int64)
    assert usable_sequences(torch.tensor(scores), groups, 2).int().tolist() == expected


def test_signals_are_padded_from_groups():
    groups = make_groups()
    batch = pack(groups, pad_id=0)
    signals = TokenSignals.from_groups(groups, batch)
    assert signals.scores.shape == signals.ranks.shape == (20,)
    assert torch.isnan(signals.scores).sum() == 4
    np.testing.assert_array_equal(signals.old_values[0][batch.length_mask[0]].numpy(), groups[0].values[0])
    assert signals.advantages is None and signals.mask is None


def test_a_signal_that_some_group_lacks_is_not_set():
    groups = make_groups()
    groups[3] = replace(groups[3], reference_log_probs=None, scores=None)
    signals = TokenSignals.from_groups(groups, pack(groups, pad_id=0))
    assert signals.reference_log_probs is None and signals.scores is None
    assert signals.behaviour_log_probs is not None


def test_select_gives_the_signals_of_a_micro_batch():
    groups = make_groups()
    whole = pack(groups, pad_id=0)
    micro = pack([groups[3], groups[1]], pad_id=0)
    cut = TokenSignals.from_groups(groups, whole).select(sequences_of_groups(whole, [3, 1]), micro.mask.shape[1])
    expected = TokenSignals.from_groups([groups[3], groups[1]], micro)
    torch.testing.assert_close(cut.behaviour_log_probs, expected.behaviour_log_probs)
    torch.testing.assert_close(cut.scores, expected.scores, equal_nan=True)


def test_a_group_without_scores_is_not_a_missing_score():
    groups = [replace(make_groups()[3], scores=None)]
    with pytest.raises(DataError, match="prompt p3: found no scores"):
        PolicyObjective(PolicyConfig()).count(groups)


@pytest.mark.parametrize("kind", ["policy", "value", "rank", "supervised", "preference"])
def test_every_kind_of_config_builds_its_objective(kind):
    config = TypeAdapter(ObjectiveConfig).validate_python({"kind": kind})
    objective = build_objective(config)
    assert type(objective).__name__ == f"{kind.capitalize()}Objective"
    assert objective.head == ("scalar" if kind in ("value", "rank") else "language_model")
