from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import ConfigError, DataError
from rlhf.maths.packing import deal, pack, pad_tokens, plan_micro_batches, split_by_group, split_by_length, split_plan
from rlhf.types import TrainGroup


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


GROUPS = [
    TrainGroup("a", ids(1, 2, 3), (ids(10, 11, 12, 13), ids(20, 21))),
    TrainGroup("b", ids(4), (ids(30),), loss_masks=(np.array([False]),)),
]


def test_layout_by_hand():
    batch = pack(GROUPS, pad_id=0, multiple_of=4)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 10, 11, 12, 13, 20, 21, 0, 0, 0],
        [4, 30] + [0] * 10,
    ]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 0, 0, 0]
    assert batch.position_ids[1].tolist() == list(range(12))
    assert batch.segment_ids[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1, -1]
    assert batch.target_ids.tolist() == [[10, 11, 12, 13], [20, 21, 0, 0], [30, 0, 0, 0]]
    assert batch.gather_index.tolist() == [[2, 3, 4, 5], [2, 7, 0, 0], [0, 0, 0, 0]]
    assert batch.last_index.tolist() == [6, 8, 1]
    assert batch.row_index.tolist() == batch.group_index.tolist() == [0, 0, 1]
    assert batch.length_mask.sum(-1).tolist() == [4, 2, 1]
    assert batch.mask.sum(-1).tolist() == [4, 2, 0]
    assert (batch.num_groups, batch.num_sequences, batch.uids) == (2, 3, ("a", "b"))
    assert not batch.is_causal


def test_one_row_per_sequence():
    batch = pack(GROUPS, pad_id=0, share_prefix=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 12, 13], [1, 2, 3, 20, 21, 0, 0], [4, 30, 0, 0, 0, 0, 0]]
    assert batch.row_index.tolist() == [0, 1, 2] and batch.group_index.tolist() == [0, 0, 1]
    assert batch.last_index.tolist() == [6, 4, 1]
    assert batch.is_causal


def test_attention_mask_by_hand():
    group = TrainGroup("a", ids(1, 2), (ids(10), ids(20, 21)))
    allowed = pack([group], pad_id=0, multiple_of=3).attention_mask()
    assert allowed.shape == (1, 1, 6, 6) and allowed.dtype == torch.bool
    assert allowed[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_the_additive_mask_says_the_same():
    batch = pack(GROUPS, pad_id=0)
    allowed, additive = batch.attention_mask(), batch.attention_mask(torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert ((additive == 0) == allowed).all()
    assert (additive[~allowed] == torch.finfo(torch.bfloat16).min).all()


def test_gather_and_scatter_follow_targets():
    batch = pack(GROUPS, pad_id=0)
    places = torch.arange(batch.input_ids.numel()).reshape(batch.input_ids.shape).float()
    flat = batch.gather_targets(places)
    assert flat.tolist() == [2, 3, 4, 5, 2, 7, 9]
    assert batch.scatter_targets(flat)[1].tolist() == [2, 7, 0, 0]
    assert batch.gather_targets(places[..., None].expand(-1, -1, 5)).shape == (7, 5)
    assert batch.gather_last(places).tolist() == [6, 8, 10]


def test_scatter_keeps_gradients():
    batch = pack(GROUPS, pad_id=0)
    values = torch.ones(7, requires_grad=True)
    (batch.scatter_targets(values) * torch.arange(12.0).reshape(3, 4)).sum().backward()
    assert values.grad.tolist() == [0, 1, 2, 3, 4, 5, 8]


def test_split_undoes_pad():
    batch = pack(GROUPS, pad_id=0)
    arrays = [(np.array([1, 2, 3, 4], np.float32), np.array([5, 6], np.float32)), (np.array([7], np.float32),)]
    padded = pad_tokens(arrays, batch)
    assert padded.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]]
    for found, expected in zip(split_by_length(padded.double(), batch), arrays, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, other)


def test_an_array_of_another_length_is_refused():
    with pytest.raises(DataError, match="Annotate again"):
        pad_tokens(
            [(np.zeros(3, np.float32), np.zeros(2, np.float32)), (np.zeros(1, np.float32),)], pack(GROUPS, pad_id=0)
        )


def test_an_empty_completion_is_read_at_the_prompt():
    batch = pack([TrainGroup("a", ids(1, 2), (ids(), ids(5)))], pad_id=0)
    assert batch.last_index.tolist() == [1, 2]
    assert batch.length_mask.tolist() == [[False], [True]]
    assert [len(a) for a in split_by_length(torch.zeros(2, 1), batch)[0]] == [0, 1]


def test_one_number_per_sequence_goes_to_its_group():
    assert split_by_group(torch.tensor([1.0, 2.0, 3.0]), pack(GROUPS, pad_id=0)) == [[1.0, 2.0], [3.0]]


def test_moving_keeps_everything():
    batch = pack(GROUPS, pad_id=0)
    moved = batch.to("cpu")
    assert moved.uids == batch.uids and torch.equal(moved.gather_index, batch.gather_index)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no groups"),
        ([TrainGroup("x", ids(), (ids(1),))], "prompt x: found an empty prompt"),
        ([TrainGroup("x", ids(1), ())], "prompt x: found no completions"),
        ([TrainGroup("x", ids(1), (ids(1, 2),), loss_masks=(np.array([True]),))], "loss masks"),
    ],
)
def test_what_cannot_be_packed_is_named(groups, message):
    with pytest.raises(DataError, match=message):
        pack(groups, pad_id=0)


def test_dealing_by_hand():
    # Falling lengths 9 8 | 4 3 | 2 1: of each pair the longer goes to the lighter rank, of equals to the first.
    assert deal([4, 9, 1, 8, 3, 2], 2) == [[1, 4, 5], [0, 2, 3]]
    assert deal([3, 3, 3], 3) == [[0], [1], [2]]


def test_one_long_group_does_not_leave_its_rank_without_others():
    assert deal([100, 1, 1, 1], 2) == [[0, 3], [1, 2]], "two mini-batches need two groups on every rank"


def test_fewer_groups_than_ranks_is_an_error():
    with pytest.raises(ConfigError, match="2 groups for 3 learner ranks"):
        deal([5, 5], 3)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40), num_ranks=st.integers(1, 8))
def test_every_rank_gets_as_many_groups_and_nearly_as_many_tokens(lengths, num_ranks):
    if len(lengths) < num_ranks:
        with pytest.raises(ConfigError):
            deal(lengths, num_ranks)
        return
    shares = deal(lengths, num_ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_plan_by_hand():
    assert plan_micro_batches([9, 3, 2], max_tokens=9) == [[0], [1, 2]]
    assert plan_micro_batches([4, 1, 8], max_tokens=9) == [[2], [0, 1]]
    assert plan_micro_batches([], max_tokens=9) == []


def test_a_group_that_is_too_long_goes_alone():
    assert plan_micro_batches([50, 3, 3], max_tokens=10) == [[0], [1, 2]]


def test_a_plan_is_split_as_far_as_it_goes_and_then_filled_with_empty_micro_batches():
    assert split_plan([[0, 1, 2], [3]], 3) == [[0], [1, 2], [3]]
    assert split_plan([[0, 1], [2]], 5) == [[0], [1], [2], [], []]
    assert split_plan([[0]], 1) == [[0]]


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    max_tokens=st.integers(1, 800),
    more=st.integers(0, 10),
)
def test_plans_keep_their_promises(lengths, max_tokens, more):
    first = plan_micro_batches(lengths, max_tokens=max_tokens)
    assert first == plan_micro_batches(list(lengths), max_tokens=max_tokens)
    plan = split_plan(first, len(first) + more)
    assert len(plan) == len(first) + more
    assert sorted(i for rows in plan for i in rows) == list(range(len(lengths)))
    for rows in plan:
        assert len(rows) <= 1 or len(rows) * max(lengths[i] for i in rows) <= max_tokens
        assert rows or len(plan) > len(lengths), "empty only where there are more of them than groups"
