"""The step buffer: staleness bound, no step lost or taken twice, bounded waits."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf.errors import DeadlineError
from rlhf.loops.buffer import StepBatch, StepBuffer
from tests.fakes import breathe


async def end(*tasks: asyncio.Task | None) -> None:
    for task in tasks:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class BufferMachine(RuleBasedStateMachine):
    """A collector and a learner that move in any interleaving; a wait that may not end yet stays pending."""

    @initialize(first=st.integers(0, 3), staleness=st.integers(0, 2))
    def begin(self, first: int, staleness: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.staleness = staleness
        self.buffer = StepBuffer(first, staleness, timeout_s=60.0)
        self.first = self.published = self.next_taken = first
        self.next_granted = first
        self.granted: list[int] = []
        self.put: list[int] = []
        self.taken: list[int] = []
        self.grant: asyncio.Task | None = None
        self.take: asyncio.Task | None = None

    def settle(self) -> None:
        self.loop.run_until_complete(breathe(10))
        if self.grant is not None and self.grant.done():
            self.grant.result()
            self.granted.append(self.next_granted)
            self.next_granted += 1
            self.grant = None
        if self.take is not None and self.take.done():
            assert self.take.result().step == self.next_taken
            self.taken.append(self.next_taken)
            self.next_taken += 1
            self.take = None

    @precondition(lambda self: self.grant is None and len(self.put) == len(self.granted))
    @rule()
    def ask_for_a_slot(self) -> None:
        self.grant = self.loop.create_task(self.buffer.grant(self.next_granted))
        self.settle()

    @precondition(lambda self: len(self.put) < len(self.granted))
    @rule()
    def put_batch(self) -> None:
        step = self.granted[len(self.put)]
        self.loop.run_until_complete(self.buffer.put(StepBatch(step, (), {"position": step})))
        self.put.append(step)
        self.settle()

    @precondition(lambda self: self.take is None and len(self.taken) == self.published - self.first)
    @rule()
    def ask_for_a_batch(self) -> None:
        self.take = self.loop.create_task(self.buffer.take(self.next_taken))
        self.settle()

    @precondition(lambda self: len(self.taken) > self.published - self.first)
    @rule()
    def publish(self) -> None:
        self.published += 1
        self.loop.run_until_complete(self.buffer.publish(self.published))
        self.settle()

    @precondition(lambda self: self.take is not None)
    @rule()
    def give_the_take_up(self) -> None:
        self.loop.run_until_complete(end(self.take))
        self.take = None

    @precondition(lambda self: self.grant is not None)
    @rule()
    def give_the_grant_up(self) -> None:
        self.loop.run_until_complete(end(self.grant))
        self.grant = None

    @invariant()
    def generation_is_never_too_far_ahead(self) -> None:
        if hasattr(self, "granted"):
            assert all(step <= self.published + self.staleness for step in self.granted)

    @invariant()
    def no_step_is_lost_or_taken_twice(self) -> None:
        if hasattr(self, "taken"):
            assert self.taken == list(range(self.first, self.first + len(self.taken)))
            assert self.taken == self.put[: len(self.taken)]

    @invariant()
    def what_may_go_on_does(self) -> None:
        if hasattr(self, "grant"):
            assert self.grant is None or self.next_granted > self.published + self.staleness
            assert self.take is None or self.next_taken not in self.put

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run_until_complete(end(self.grant, self.take))
            self.loop.close()


BufferMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBuffer = BufferMachine.TestCase


def test_a_slot_that_never_frees_ends_in_a_deadline() -> None:
    with pytest.raises(DeadlineError, match="slot for step 1"):
        asyncio.run(StepBuffer(0, 0, timeout_s=0.02).grant(1))


def test_a_batch_that_never_comes_ends_in_a_deadline() -> None:
    with pytest.raises(DeadlineError, match="batch of step 0"):
        asyncio.run(StepBuffer(0, 1, timeout_s=0.02).take(0))


@pytest.mark.parametrize(("staleness", "oldest"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2])])
def test_the_weights_that_draw_a_step(staleness: int, oldest: list[int]) -> None:
    buffer = StepBuffer(0, staleness, timeout_s=1.0)
    assert [buffer.oldest_update(step) for step in range(4)] == oldest


def test_a_batch_is_given_away_once() -> None:
    async def body() -> None:
        buffer = StepBuffer(0, 0, timeout_s=0.05)
        await buffer.put(StepBatch(0, (), {}))
        assert (await buffer.take(0)).step == 0
        with pytest.raises(DeadlineError):
            await buffer.take(0)

    asyncio.run(body())
