"""The budget gate: never above capacity, first come first served, and nothing lost by cancellation."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import ConfigError, DeadlineError
from rlhf.loops.gate import BudgetGate
from tests.fakes import breathe

TIMEOUT = 60.0


async def use(gate: BudgetGate, role: str, held: list[str], log: list[str], pauses: int) -> None:
    async with gate.hold(role):
        held.append(role)
        log.append(role)
        await breathe(pauses)
        held.remove(role)


def test_an_exclusive_gate_has_one_holder() -> None:
    async def body() -> None:
        gate = BudgetGate({role: 1.0 for role in "abc"})
        held: list[str] = []
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(held))
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(use(gate, "abc"[i % 3], held, [], i % 4) for i in range(12)))
        watcher.cancel()
        assert most == 1

    asyncio.run(asyncio.wait_for(body(), TIMEOUT))


@given(
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1 / 3, 1.0]), min_size=1, max_size=12),
    seed=st.integers(0, 10**6),
    cancel=st.lists(st.booleans(), min_size=12, max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_shares_never_add_up_above_capacity_and_cancelled_waiters_take_nothing(shares, seed, cancel) -> None:
    async def body() -> None:
        draw = random.Random(seed)
        gate = BudgetGate({str(i): share for i, share in enumerate(shares)})
        holding: dict[int, float] = {}

        async def role(i: int) -> None:
            await breathe(draw.randrange(4))
            async with gate.hold(str(i)):
                holding[i] = shares[i]
                assert sum(holding.values()) <= 1.0 + 1e-6
                try:
                    await breathe(draw.randrange(4))
                finally:
                    del holding[i]

        tasks = [asyncio.create_task(role(i)) for i in range(len(shares))]
        await breathe(draw.randrange(4))
        for i, task in enumerate(tasks):
            if cancel[i]:
                task.cancel()  # while it waits, while it holds, or between grant and start
                await breathe(draw.randrange(2))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results

        assert not holding
        async with asyncio.timeout(TIMEOUT):  # the whole budget is there again
            await asyncio.gather(*(use(gate, str(i), [], [], 1) for i in range(len(shares))))
            full = BudgetGate.hold(gate, str(shares.index(max(shares))))
            async with full:
                pass
        assert gate._free == pytest.approx(1.0)

    asyncio.run(asyncio.wait_for(body(), TIMEOUT))


def test_first_come_first_served_a_small_share_does_not_overtake() -> None:
    async def body() -> None:
        gate = BudgetGate({"half": 0.5, "whole": 1.0})
        log: list[str] = []
        first = asyncio.create_task(use(gate, "half", [], log, 5))
        await breathe(1)
        rest = [asyncio.create_task(use(gate, role, [], log, 1)) for role in ("whole", "half", "whole", "half")]
        await asyncio.gather(first, *rest)
        assert log == ["half", "whole", "half", "whole", "half"]

    asyncio.run(asyncio.wait_for(body(), TIMEOUT))


def test_a_role_that_takes_nothing_never_waits() -> None:
    async def body() -> None:
        gate = BudgetGate({"all": 1.0, "free": 0.0})
        async with gate.hold("all"):
            waiter = asyncio.create_task(use(gate, "all", [], [], 0))
            await breathe()
            async with gate.hold("free"), gate.hold("unnamed"):
                pass
            assert not waiter.done()
        await waiter

    asyncio.run(asyncio.wait_for(body(), TIMEOUT))


def test_cancelling_a_waiter_lets_the_next_one_in() -> None:
    async def body() -> None:
        gate = BudgetGate({"half": 0.5, "whole": 1.0})
        log: list[str] = []
        async with gate.hold("half"):
            blocked = asyncio.create_task(use(gate, "whole", [], log, 0))
            behind = asyncio.create_task(use(gate, "half", [], log, 0))
            await breathe()
            assert log == []
            blocked.cancel()
            await behind
            assert log == ["half"]

    asyncio.run(asyncio.wait_for(body(), TIMEOUT))


def test_a_failure_inside_gives_the_share_back() -> None:
    async def body() -> None:
        gate = BudgetGate({"a": 1.0})
        with pytest.raises(RuntimeError, match="body"):
            async with gate.hold("a"):
                raise RuntimeError("body")
        async with gate.hold("a"):
            pass

    asyncio.run(asyncio.wait_for(body(), TIMEOUT))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_that_could_never_be_granted_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="gate share of learner"):
        BudgetGate({"learner": share})


def test_a_wait_for_a_phase_that_does_not_end_is_an_error_that_names_it_and_takes_nothing() -> None:
    async def body() -> None:
        gate = BudgetGate({"learner": 1.0, "judge": 1.0}, timeout_s=0.05)
        async with gate.hold("learner"):
            with pytest.raises(DeadlineError, match=r"phase gate, judge: found learner at work"):
                async with gate.hold("judge"):
                    raise AssertionError("two at once")
        async with gate.hold("judge"):  # the budget is whole again
            pass

    asyncio.run(asyncio.wait_for(body(), TIMEOUT))
