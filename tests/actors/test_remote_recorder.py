"""The driver's side of a recorder that dies, hangs, comes back or does not. Time is virtual, and Ray is replaced."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray

from actors.dispatch import REPLACEABLE
from actors.prober import ProbeLimits
from actors.remote_recorder import RemoteRecorder
from actors.replicas import FleetLimits
from rlhf.errors import DataError, DeadlineError, RecordError, RolloutsLostError
from tests.actors.local_ray import LocalActor, RestartingActor
from tests.virtual_time import VirtualTimeLoop

RESTART_S = 5.0


class World:
    """A recorder that writes down what it is asked, its driver's side, and the events."""

    def __init__(self, restart_s: float = RESTART_S, *, timeout_s: float = 600.0, **limits: Any) -> None:
        self.asked: list[tuple[str, int]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.hung: set[str] = set()
        """Processes that answer nothing."""
        self.fails: Exception | None = None
        names = itertools.count()
        self.actor = RestartingActor(lambda _: _Worker(self, f"process {next(names)}"), "recorder", restart_s=restart_s)
        self.remote = RemoteRecorder(
            self.actor,
            lambda kind, **fields: self.events.append((kind, fields)),
            limits=FleetLimits(**({"start_timeout_s": 60.0} | limits)),
            probes=ProbeLimits(every_s=10.0, timeout_s=30.0),
            timeout_s=timeout_s,
        )

    def kinds(self) -> list[str]:
        """Of the events."""
        return [kind for kind, _ in self.events]

    def told(self, kind: str) -> dict[str, Any]:
        """The fields of the one event of a kind."""
        [fields] = [fields for found, fields in self.events if found == kind]
        return fields


class _Worker:
    def __init__(self, world: World, process: str) -> None:
        self._world, self._process = world, process

    async def ping(self) -> str:
        await self._answer()
        return self._process

    async def record(self, step: int) -> str:
        await self._answer()
        self._world.asked.append((self._process, step))
        await asyncio.sleep(2.0)
        if self._world.fails is not None:
            raise self._world.fails
        return f"{step} by {self._process}"

    async def _answer(self) -> None:
        if self._process in self._world.hung:
            await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def killing(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(actor: LocalActor, *, no_restart: bool) -> None:
        actor.end() if no_restart else actor.die()

    monkeypatch.setattr(ray, "kill", kill)


def drive(world: Callable[[], World], body: Callable[[World], Awaitable[None]]) -> World:
    loop = VirtualTimeLoop()
    made: list[World] = []

    async def run() -> None:
        made.append(world())
        await made[0].remote.start()
        await body(made[0])

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return made[0]


def after(seconds: float, action: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, action)


def test_a_call_that_the_recorder_dies_in_goes_out_again_to_the_next_one() -> None:
    async def body(world: World) -> None:
        after(1.0, world.actor.die)
        assert await world.remote.call("record", 7) == "7 by process 1"
        assert world.asked == [("process 0", 7), ("process 1", 7)]
        assert await world.remote.call("record", 8) == "8 by process 1"

    world = drive(World, body)
    assert world.kinds() == ["replica_lost", "replica_joined"]
    lost, joined = world.told("replica_lost"), world.told("replica_joined")
    assert (lost["role"], lost["replica"], lost["lost_steps"], lost["lost_tokens"]) == ("recorder", 0, 0, 0)
    assert lost["detect_s"] == 1.0 and "restarting" in lost["error"]
    assert (joined["role"], joined["replica"], joined["replaces"]) == ("recorder", 1, 0)
    assert RESTART_S <= joined["seconds"] < RESTART_S + 1.0
    assert joined["recover_s"] == pytest.approx(joined["seconds"] + 1.0)


def test_many_calls_at_once_find_one_loss() -> None:
    async def body(world: World) -> None:
        after(1.0, world.actor.die)
        found = await asyncio.gather(*(world.remote.call("record", step) for step in range(4)), world.remote.look())
        assert found[:4] == [f"{step} by process 1" for step in range(4)]

    assert drive(World, body).kinds() == ["replica_lost", "replica_joined"]


def test_a_recorder_may_be_lost_again_as_often_as_the_budget_of_this_time_has_restarts() -> None:
    async def body(world: World) -> None:
        for step in range(3):
            after(1.0, world.actor.die)
            if step < 2:
                assert await world.remote.call("record", step) == f"{step} by process {step + 1}"
            else:
                with pytest.raises(RecordError, match="Run the same command again") as caught:
                    await world.remote.call("record", step)
                assert not isinstance(caught.value, REPLACEABLE)
        assert world.actor.ended, "nobody waits for it any more"
        with pytest.raises(RecordError, match="recorder.record"):
            await world.remote.call("record", 9)
        await world.remote.watch()  # has nothing to watch

    world = drive(lambda: World(max_restarts=2, restart_window_s=1000.0), body)
    assert world.kinds() == ["replica_lost", "replica_joined"] * 2 + ["replica_lost", "restarts_used_up"]
    assert world.told("restarts_used_up")["max_restarts"] == 2


def test_restarts_that_lie_behind_the_window_do_not_count() -> None:
    async def body(world: World) -> None:
        for step in range(4):
            after(1.0, world.actor.die)
            await world.remote.call("record", step)
            await asyncio.sleep(100.0)

    world = drive(lambda: World(max_restarts=1, restart_window_s=100.0), body)
    assert world.kinds() == ["replica_lost", "replica_joined"] * 4


def test_one_that_is_ended_for_good_is_told_at_once() -> None:
    async def body(world: World) -> None:
        after(1.0, world.actor.end)
        with pytest.raises(RecordError, match="needed the run's recorder"):
            await world.remote.call("record", 0)
        with pytest.raises(RecordError):
            await world.remote.look()

    assert drive(World, body).kinds() == ["replica_lost"]


def test_one_that_finds_no_place_in_time_is_given_up() -> None:
    async def body(world: World) -> None:
        after(1.0, world.actor.die)
        with pytest.raises(RecordError, match="no restart within 60 s"):
            await world.remote.call("record", 0)
        assert world.actor.ended

    assert drive(lambda: World(restart_s=1e6), body).kinds() == ["replica_lost", "restart_failed"]


def test_a_call_waits_no_longer_than_it_may_and_the_run_may_ask_again() -> None:
    async def body(world: World) -> None:
        after(1.0, world.actor.die)
        with pytest.raises(DeadlineError, match=r"recorder\.record: found no recorder after 10 s"):
            await world.remote.call("record", 0)
        await asyncio.sleep(30.0)
        assert await world.remote.call("record", 1) == "1 by process 1"

    assert drive(lambda: World(30.0, timeout_s=10.0), body).kinds() == ["replica_lost", "replica_joined"]


@pytest.mark.parametrize("fault", [RolloutsLostError.of("recorder", ["p0"], "gone"), RecordError, DataError])
def test_what_the_recorder_says_itself_is_no_loss(fault: Any) -> None:
    error = fault if isinstance(fault, Exception) else fault("table", found="a", needed="b", action="c")

    async def body(world: World) -> None:
        world.fails = error
        with pytest.raises(type(error)) as caught:
            await world.remote.call("record", 0)
        assert caught.value is error
        assert len(world.asked) == 1

    assert drive(World, body).kinds() == []


def test_handles_that_died_with_the_recorder_come_back_as_lost_rollouts() -> None:
    """The next process is asked the same, and cannot read what the one before it owned."""
    lost = RolloutsLostError.of("recorder", ["p0", "p1"], "OwnerDiedError")

    async def body(world: World) -> None:
        def die() -> None:
            world.actor.die()
            world.fails = lost

        after(1.0, die)
        with pytest.raises(RolloutsLostError) as caught:
            await world.remote.call("record", 0)
        assert caught.value.uids == ("p0", "p1")
        assert world.asked == [("process 0", 0), ("process 1", 0)]

    drive(World, body)


def test_a_restart_that_no_call_has_met_is_seen_by_the_watch() -> None:
    async def body(world: World) -> None:
        watch = asyncio.create_task(world.remote.watch())
        after(11.0, world.actor.die)
        await asyncio.sleep(25.0)
        watch.cancel()

    world = drive(World, body)
    assert world.kinds() == ["replica_lost", "replica_joined"]
    assert world.told("replica_lost")["detect_s"] == pytest.approx(10.0), "it had answered at 10, and is asked at 20"
    assert "another process" in world.told("replica_lost")["error"]


def test_a_recorder_that_hangs_is_ended_after_two_probes_and_its_calls_go_out_again() -> None:
    async def body(world: World) -> None:
        world.hung.add("process 0")
        watch = asyncio.create_task(world.remote.watch())
        assert await world.remote.call("record", 3) == "3 by process 1"
        watch.cancel()

    world = drive(World, body)
    assert world.kinds() == ["replica_lost", "replica_joined"]
    assert world.told("replica_lost")["detect_s"] == pytest.approx(60.0)


def test_one_that_was_cut_off_and_has_lost_nothing_costs_no_restart() -> None:
    async def body(world: World) -> None:
        for step in range(3):

            def reach() -> None:
                world.actor.alive = True

            def cut() -> None:
                world.actor.alive = False
                after(3.0, reach)

            cut()
            assert await world.remote.call("record", step) == f"{step} by process 0"

    world = drive(lambda: World(max_restarts=1), body)
    assert world.kinds() == ["replica_lost", "replica_recovered"] * 3
