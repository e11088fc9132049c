from __future__ import annotations

import math

import torch

from rlhf.maths.pairs import count_ordered_pairs, ordered_pairs

NAN = math.nan


def test_pairs_by_hand():
    ranks = torch.tensor([2.0, 1.0, 2.0, NAN, 5.0, 4.0, 1.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    pairs = ordered_pairs(ranks, groups, 3)
    assert list(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [(1, 0), (1, 2), (5, 4)]
    assert pairs.share.tolist() == [0.5, 0.5, 1.0]
    assert pairs.num_pairs.tolist() == [2.0, 1.0, 0.0]


def test_counting_agrees_with_listing():
    for ranks in ([1, 2, 3, 4], [1, 1, 1], [NAN, 2, 1], [NAN, NAN], [3, 3, 1, NAN, 2]):
        listed = ordered_pairs(torch.tensor(ranks, dtype=torch.float32), torch.zeros(len(ranks), dtype=torch.int64), 1)
        assert count_ordered_pairs(ranks) == len(listed.better)


def test_all_ties_give_no_pair():
    pairs = ordered_pairs(torch.ones(3), torch.zeros(3, dtype=torch.int64), 1)
    assert len(pairs.better) == len(pairs.share) == 0
