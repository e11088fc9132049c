"""The autoscaler: its policy as a table and as properties, and its task on a fleet of fakes."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.autoscale import AutoscaleConfig, Autoscaler, Window, autoscale, wanted_replicas
from rlhf.errors import PlacementError

POLICY = AutoscaleConfig(min_replicas=1, max_replicas=8, target_items_per_replica=10, tolerance=0.2)


@pytest.mark.parametrize(
    ("num_replicas", "mean_items", "wanted"),
    [
        (1, 10, 1),  # on target
        (1, 12, 1),  # at the edge of what is tolerated
        (1, 12.1, 2),  # above it
        (1, 35, 4),  # at once to what the load asks for
        (1, 1000, 8),  # not above the bound
        (4, 40, 4),
        (4, 24.1, 4),  # three would each have more than 8, where they ought to be below that
        (4, 24, 3),
        (4, 8, 1),
        (4, 0, 1),  # not below the bound
        (8, 1000, 8),
    ],
)
def test_the_load_asks_for_replicas(num_replicas: int, mean_items: float, wanted: int) -> None:
    assert wanted_replicas(POLICY, num_replicas, mean_items) == wanted


policies = st.builds(
    lambda low, more, target, tolerance, window, cooldown: AutoscaleConfig(
        min_replicas=low,
        max_replicas=low + more,
        target_items_per_replica=target,
        tolerance=tolerance,
        window_s=window,
        cooldown_s=cooldown,
    ),
    st.integers(1, 5),
    st.integers(0, 20),
    st.floats(0.1, 100),
    st.floats(0, 0.9),
    st.floats(0.5, 100),
    st.floats(0, 500),
)


@given(policies, st.integers(1, 40), st.floats(0, 10_000))
def test_a_number_that_a_load_asks_for_is_left_alone_under_that_load(
    policy: AutoscaleConfig, num_replicas: int, mean_items: float
) -> None:
    wanted = wanted_replicas(policy, num_replicas, mean_items)
    assert policy.min_replicas <= wanted <= policy.max_replicas
    assert wanted_replicas(policy, wanted, mean_items) == wanted, "else it would go up and down for ever"


@given(policies, st.lists(st.tuples(st.floats(0.1, 60), st.floats(0, 1000)), max_size=60), st.integers(0, 20))
def test_never_outside_the_bounds_and_never_twice_within_the_cool_down(
    policy: AutoscaleConfig, load: list[tuple[float, float]], more: int
) -> None:
    now, num_replicas = 0.0, min(policy.min_replicas + more, policy.max_replicas)
    autoscaler, changes = Autoscaler(policy, now), []
    for seconds, num_items in load:
        now += seconds
        wanted = autoscaler.decide(now, num_replicas, num_items)
        assert policy.min_replicas <= wanted <= policy.max_replicas
        if wanted != num_replicas:
            changes.append(now)
            num_replicas = wanted
    assert all(later - sooner >= policy.cooldown_s for sooner, later in zip(changes, changes[1:], strict=False))
    assert not changes or changes[0] >= policy.window_s


def test_the_mean_of_a_window_is_weighted_by_time_and_none_before_it_is_full() -> None:
    window = Window(10.0)
    assert window.mean(0.0) is None
    window.add(0.0, 30)
    window.add(5.0, 10)
    assert window.mean(9.0) is None
    assert window.mean(10.0) == pytest.approx(20)
    assert window.mean(12.5) == pytest.approx((2.5 * 30 + 7.5 * 10) / 10)
    window.add(16.0, 0)
    assert window.mean(18.0) == pytest.approx((8 * 10 + 2 * 0) / 10)
    assert window.mean(100.0) == 0


@given(st.lists(st.tuples(st.floats(0.01, 20), st.floats(0, 100)), min_size=1, max_size=30))
def test_the_mean_lies_between_the_least_and_the_most(samples: list[tuple[float, float]]) -> None:
    window, now = Window(7.0), 0.0
    for seconds, num_items in samples:
        now += seconds
        window.add(now, num_items)
    mean = window.mean(now + 1.0)
    values = [num_items for _, num_items in samples]
    assert mean is None or min(values) - 1e-9 <= mean <= max(values) + 1e-9
    assert mean is None or math.isfinite(mean)


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_replicas no higher"):
        AutoscaleConfig(min_replicas=3, max_replicas=2, target_items_per_replica=1)


class FakeFleet:
    """Grows by asking; ``room`` is opened by the test."""

    role = "generation"

    def __init__(self) -> None:
        self.wanted, self.backlog = 1, 0
        self.room = asyncio.Event()
        self.asked: list[int] = []

    async def scale(self, num_replicas: int) -> None:
        self.asked.append(num_replicas)
        self.wanted = num_replicas
        await self.room.wait()
        if num_replicas == 3:
            self.wanted = 1
            raise PlacementError("role generation", found="no room", needed="a node", action="Add one.")


def test_a_scale_that_waits_for_room_blocks_nobody_and_one_that_fails_is_an_event() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    now = 0.0

    async def body() -> None:
        nonlocal now
        fleet: Any = FakeFleet()
        policy = AutoscaleConfig(max_replicas=3, target_items_per_replica=1, window_s=5.0, cooldown_s=10.0)

        def tell(kind: str, **fields: Any) -> None:
            events.append((kind, fields))

        task = asyncio.create_task(autoscale(fleet, policy, tell, interval_s=0.001, clock=lambda: now))
        await asyncio.sleep(0.02)  # the clock stands still: the window does not fill, however often it looks
        assert fleet.asked == []
        fleet.backlog = 30
        for now in range(1, 12):  # noqa: B007 - the clock of the task
            await asyncio.sleep(0.02)
        assert fleet.asked == [3], "it waits for room, and the task looks on"
        fleet.backlog = 0
        for now in range(12, 40):  # noqa: B007
            await asyncio.sleep(0.02)
        assert fleet.asked == [3], "one change at a time"
        fleet.room.set()
        while len(events) < 2:
            await asyncio.sleep(0.01)
        assert [kind for kind, _ in events] == ["autoscaled", "scaling_failed"]
        assert events[0][1] == {"role": "generation", "before": 1, "replicas": 3, "items": 30}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(body(), 60))
