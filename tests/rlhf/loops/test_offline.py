"""The offline loop: batches partition an epoch whatever the number of ranks, and a resumed run repeats nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import ConfigError, NonFiniteError
from rlhf.loops.offline import (
    OfflineConfig,
    OfflineHooks,
    check_batches,
    check_first_step,
    epoch_batches,
    num_steps,
    tokens_from,
    train_offline,
)
from rlhf.types import TrainGroup

GROUPS = st.integers(1, 60)
SIZE = st.integers(1, 20)


def make_groups(num_groups: int) -> list[TrainGroup]:
    ids = np.array([1, 2], dtype=np.int32)
    return [TrainGroup(f"g{i}", ids, (ids,)) for i in range(num_groups)]


class Rank:
    """One learner rank with its hooks, written down."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.shares: list[list[str]] = []
        self.evaluated: list[list[str]] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.batches: dict[int, list[str]] = {}
        self.checkpoints: list[int] = []
        self.stop_after = stop_after

    def train_step(self, groups) -> dict[str, float]:
        self.shares.append([group.uid for group in groups])
        return {"loss": float(len(self.shares))}

    def evaluate(self, groups) -> dict[str, float]:
        self.evaluated.append([group.uid for group in groups])
        return {"loss": 9.0}

    @property
    def hooks(self) -> OfflineHooks:
        def log(step, metrics, uids) -> None:
            self.logged[step] = dict(metrics)
            self.batches[step] = list(uids)

        def should_stop() -> bool:
            return self.stop_after is not None and len(self.shares) >= self.stop_after

        return OfflineHooks(log, self.checkpoints.append, should_stop)


def run(num_groups: int, config: OfflineConfig, *, rank=0, num_ranks=1, first_step=0, held_out=0, stop_after=None):
    learner = Rank(stop_after)
    done = train_offline(
        learner,
        make_groups(num_groups),
        make_groups(held_out),
        config,
        learner.hooks,
        rank=rank,
        num_ranks=num_ranks,
        seed=3,
        first_step=first_step,
    )
    return learner, done


@given(GROUPS, SIZE, st.integers(0, 5), st.integers(0, 3))
def test_batches_hold_each_index_once_and_are_nearly_equal(num_groups, size, seed, epoch) -> None:
    batches = epoch_batches(num_groups, size, seed=seed, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(num_groups))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == num_steps(num_groups, OfflineConfig(groups_per_step=size))


def test_epochs_and_seeds_shuffle_differently_and_repeatably() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(i) for batch in epoch_batches(40, 7, seed=seed, epoch=epoch) for i in batch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.integers(4, 60), st.integers(4, 20), st.integers(1, 4), st.integers(1, 2))
def test_ranks_share_each_batch_and_batches_do_not_depend_on_their_number(num_groups, size, num_ranks, epochs) -> None:
    config = OfflineConfig(epochs=epochs, groups_per_step=size)
    alone, _ = run(num_groups, config)
    ranks = [run(num_groups, config, rank=rank, num_ranks=num_ranks)[0] for rank in range(num_ranks)]
    for step, batch in enumerate(alone.shares):
        together = [uid for rank in ranks for uid in rank.shares[step]]
        assert sorted(together) == sorted(batch)
    trained = Counter(uid for batch in alone.shares for uid in batch)
    assert set(trained.values()) == {epochs}
    assert len(trained) == num_groups


@given(GROUPS, SIZE, st.integers(1, 3), st.integers(1, 100))
def test_a_resumed_run_goes_on_where_it_stopped(num_groups, size, epochs, stop_after) -> None:
    config = OfflineConfig(epochs=epochs, groups_per_step=size)
    whole, last = run(num_groups, config)
    first, done = run(num_groups, config, stop_after=stop_after)
    assert done == min(stop_after, last)
    assert first.checkpoints[-1] == done
    rest, end = run(num_groups, config, first_step=done)
    assert end == last
    assert first.shares + rest.shares == whole.shares
    assert list(rest.logged) == list(range(done + 1, last + 1))


def test_cadence_of_evaluations_and_checkpoints() -> None:
    learner, done = run(20, OfflineConfig(groups_per_step=4, evaluate_every=2, checkpoint_every=3), held_out=3)
    assert done == 5
    assert [step for step, metrics in learner.logged.items() if "held_out/loss" in metrics] == [2, 4, 5]
    assert learner.checkpoints == [3, 5]
    assert learner.logged[2] == {"loss": 2.0, "held_out/loss": 9.0}

    learner, _ = run(20, OfflineConfig(groups_per_step=4, checkpoint_every=3), held_out=3)
    assert [step for step, metrics in learner.logged.items() if "held_out/loss" in metrics] == [5]


def test_a_step_is_logged_with_the_whole_batch_and_the_one_that_ends_the_run_too() -> None:
    config = OfflineConfig(groups_per_step=4)
    learner, _ = run(8, config, num_ranks=2)
    assert all(set(share) < set(batch) for share, batch in zip(learner.shares, learner.batches.values(), strict=True))
    assert sorted(uid for batch in learner.batches.values() for uid in batch) == [f"g{i}" for i in range(8)]

    class Diverged(Rank):
        def train_step(self, groups) -> dict[str, float]:
            raise NonFiniteError("rank 0", found="NaN", needed="numbers", action="Lower the rate.")

    diverged = Diverged()
    with pytest.raises(NonFiniteError):
        train_offline(diverged, make_groups(8), [], config, diverged.hooks, rank=0, num_ranks=2, seed=3)
    assert diverged.logged == {1: {"skipped": 1.0}}
    assert diverged.batches[1] == learner.batches[1]


def test_held_out_groups_are_shared_out_too() -> None:
    config = OfflineConfig(groups_per_step=4)
    shares = [run(8, config, rank=rank, num_ranks=2, held_out=5)[0].evaluated[0] for rank in range(2)]
    assert shares == [["g0", "g2", "g4"], ["g1", "g3"]]


def test_too_few_groups_for_the_ranks_are_refused_before_anything_runs() -> None:
    check_batches(8, OfflineConfig(groups_per_step=4), 4, "stage sft")
    with pytest.raises(ConfigError, match="no training groups"):
        check_batches(0, OfflineConfig(), 1, "stage sft")
    with pytest.raises(ConfigError, match="batches of 3 groups for 4 ranks"):
        check_batches(9, OfflineConfig(groups_per_step=4), 4, "stage sft")  # 3 + 3 + 3


@given(st.integers(1, 60), SIZE, st.integers(1, 8))
def test_a_batch_that_passes_the_check_gives_every_rank_a_group(num_groups, size, num_ranks) -> None:
    config = OfflineConfig(groups_per_step=size)
    try:
        check_batches(num_groups, config, num_ranks, "stage sft")
    except ConfigError:
        return
    for batch in epoch_batches(num_groups, size, seed=0, epoch=0):
        assert all(len(batch[rank::num_ranks]) for rank in range(num_ranks))


def test_fewer_steps_than_are_done_are_refused():
    check_first_step(6, 6, "stage sft: loop.epochs")
    with pytest.raises(ConfigError, match="stage sft: loop.epochs: found 6 steps, and a checkpoint of step 7"):
        check_first_step(7, 6, "stage sft: loop.epochs")


@pytest.mark.parametrize("first_step", [0, 2, 6])
def test_the_tokens_of_a_training_are_those_of_the_batches_that_it_made(first_step):
    short, long = np.arange(2, dtype=np.int32), np.arange(7, dtype=np.int32)
    groups = [TrainGroup(f"g{i}", short, (long,) * (1 + i % 3)) for i in range(8)]
    config = OfflineConfig(epochs=2, groups_per_step=3)
    ranks = [Rank(), Rank()]
    for rank, learner in enumerate(ranks):
        of_rank = {"rank": rank, "num_ranks": 2, "seed": 3, "first_step": first_step}
        train_offline(learner, groups, [], config, learner.hooks, **of_rank)
    by_uid = {group.uid: 2 + 7 * len(group.completion_ids) for group in groups}
    expected = sum(by_uid[uid] for learner in ranks for share in learner.shares for uid in share)
    assert tokens_from(groups, config, seed=3, first_step=first_step) == expected
    assert (expected == 0) == (first_step == 6)
