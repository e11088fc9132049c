"""Replacements start beside the work: who takes a lost replica's share over, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import actors.newcomers
from actors.fleet import Fleet, FleetLimits
from actors.prober import FleetProber, ProbeLimits
from actors.replicas import Replica
from rlhf.errors import (
    DeadlineError,
    EngineError,
    LearnerError,
    PlacementError,
    ReplicaLostError,
    RlhfError,
    WorkerError,
)
from tests.actors.fleets import items, until
from tests.actors.test_fleet_races import World, assert_books, raised
from tests.actors.test_replica_states import LOST, Told, workers

CHOKED = EngineError("echo.start", found="an engine that chokes", needed="one that starts", action="None.")


@pytest.fixture(autouse=True)
def fake_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.newcomers, "kill", lambda actor: actor.die())


def drive(body: Callable[[Fleet, World, Told], Awaitable[None]], max_restarts: int = 3, window_s: float = 60.0) -> None:
    """Runs ``body`` on an empty fleet; afterwards nothing of it is left, neither actor nor task nor unseen error."""
    unseen: list[Any] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        world, told = World(random.Random(0), 0.0), Told()
        limits = FleetLimits(5.0, 5.0, max_restarts, window_s)
        fleet = Fleet("echo", world.spawn, world.retired.append, told, limits)
        async with asyncio.timeout(60):
            await body(fleet, world, told)
            await fleet.stop()
        assert not any(actor.alive for actor in world.actors) and fleet.states == {}
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    gc.collect()  # an error that nobody looked at is told when its task goes
    assert unseen == []


async def starting(world: World, number: int) -> Any:
    """The pending start of an actor whose start is not answered."""
    while len(world.actors) <= number or not world.actors[number].pending:
        await asyncio.sleep(0.001)
    return world.actors[number].pending[0]


async def finish_start(fleet: Fleet, world: World, number: int) -> None:
    """Lets a start come to its end, and the replica join."""
    (await starting(world, number)).settle(None)
    world.actors[number].pending.clear()
    await fleet.replaced()


def test_a_share_goes_to_the_others_at_once_while_the_replacement_starts() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(3)
        world.never.add("start")
        world.actors[0].die()
        assert workers(await fleet.scatter("answer", items(12))) == [1, 1, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2]
        assert told.of("redispatched") == [{"role": "echo", "replica": 0, "num_items": 4}]
        assert fleet.states == {"healthy": 2, "restarting": 1, "starting": 1}
        assert workers(await fleet.scatter_stream("stream", items(4))) == [1, 1, 2, 2], "nor does later work wait"
        await finish_start(fleet, world, 3)
        joined = told.of("replica_joined")[-1]
        assert (joined["replica"], joined["replaces"]) == (3, 0) and joined["recover_s"] > 0
        assert workers(await fleet.scatter("answer", items(3))) == [1, 2, 3]
        assert_books(fleet, world)

    drive(body)


def test_only_the_least_busy_take_a_share_over() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(3)
        busy = fleet._submit(fleet.healthy[1], "load")
        world.never.update({"start"})
        world.actors[0].die()
        fleet.healthy[1].in_flight += 1
        assert workers(await fleet.scatter("answer", items(3))) == [2, 1, 2]
        fleet.healthy[0].in_flight -= 1
        await busy

    drive(body)


def test_a_node_that_takes_several_replicas_puts_no_work_under_suspicion() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(4)
        world.never.add("start")
        for actor in world.actors[:3]:
            actor.die()
        assert workers(await fleet.scatter("answer", items(8))) == [3] * 8
        assert fleet._restarts.num_taken == 3 and told.of("item_poisoned") == []
        world.actors[3].die()
        work = asyncio.create_task(fleet.scatter("answer", items(3)))
        for number in (4, 5, 6, 7):
            await starting(world, number)
        assert not work.done(), "all of them start at once, and the first to come takes the work"
        world.actors[5].pending.pop().settle(None)
        assert workers(await work) == [5, 5, 5]

    async def probed(fleet: Fleet, world: World, told: Told) -> None:
        async def on_stall(who: str, seconds: float) -> None:
            """Nobody stalls."""

        FleetProber(fleet, ProbeLimits(), on_stall, in_loop=True)  # whoever probes tells the fleet how to ask
        await body(fleet, world, told)

    drive(probed, max_restarts=4)


def test_one_that_does_not_say_whether_it_is_there_gets_none_of_the_work() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        async def ask(replica: Replica) -> None:
            if replica.index == 1:
                raise DeadlineError("echo[1].probe", found="no answer", needed="one", action="None.")

        fleet.ask = ask
        await fleet.scale(3)
        world.actors[0].die()
        assert workers(await fleet.scatter("answer", items(3))) == [2, 1, 2], "it keeps what it has"
        assert fleet.states["suspect"] == 1

    drive(body)


def test_a_fleet_without_restarts_goes_on_with_those_that_are_left_until_there_are_none() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(2)
        world.actors[0].die()
        for _ in range(3):
            assert workers(await fleet.scatter("answer", items(2)))[1] == 1
        assert len(told.of("restarts_used_up")) == 1, "once for the loss, not with every call"
        assert fleet.num_missing == 1 and fleet.states == {"healthy": 1, "dead": 1}
        await fleet.repair()
        world.actors[1].die()
        with pytest.raises(ReplicaLostError, match=r"^echo\[1\]"):
            await fleet.scatter("answer", items(2))
        with pytest.raises(ReplicaLostError):
            await fleet.repair()
        assert len(told.of("restarts_used_up")) == 2

    drive(body, max_restarts=0)


def test_what_was_not_replaced_is_once_restarts_lie_behind_the_window_or_when_it_is_asked_for() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(2)
        for _ in range(2):
            fleet.lose(fleet.healthy[0], LOST)
            await fleet.replaced()
        fleet.lose(fleet.healthy[0], LOST)
        await fleet.replaced()
        assert fleet.states == {"healthy": 1, "dead": 1}
        [used_up] = told.of("restarts_used_up")
        assert (used_up["replicas"], used_up["max_restarts"]) == (2, 1)
        await asyncio.sleep(1.1)
        await fleet.scatter("answer", items(2))
        await fleet.replaced()
        assert fleet.states == {"healthy": 2}
        for _ in range(2):
            fleet.lose(fleet.healthy[0], LOST)
            await fleet.replaced()
        await fleet.scale(2)
        assert fleet.states == {"healthy": 2}, "whoever scales the fleet has asked for it"
        assert_books(fleet, world)

    drive(body, max_restarts=1, window_s=1.0)


def test_a_defect_of_a_replacement_ends_the_next_call_though_others_live() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(2)
        world.errors["start", 2] = raised(KeyError("k"))
        world.actors[0].die()
        assert workers(await fleet.scatter("answer", items(2))) == [1, 1]
        await fleet.replaced()
        assert len(told.of("restart_failed")) == 1 and len(world.actors) == 3
        for call in (lambda: fleet.scatter("answer", items(1)), fleet.repair, fleet.available):
            with pytest.raises(WorkerError, match=r"^echo\[2\]\.start"):
                await call()
        assert len(world.actors) == 3, "the next one would have the same code"

    drive(body)


def test_a_defect_that_nobody_asked_for_any_more_is_in_the_events() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(2)
        world.errors["start", 2] = raised(KeyError("k"))
        fleet.lose(fleet.healthy[0], LOST)
        await fleet.replaced()
        assert "KeyError" in told.of("restart_failed")[0]["error"]

    drive(body)


def test_a_lost_learner_ends_the_next_call_and_is_forgotten_with_its_weights() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        async def of_the_lost(_: Any) -> None:
            raise LearnerError("learner", found="a gang that was ended", needed="living ranks", action="Again.")

        async def of_another(_: Any) -> None:
            """It has weights."""

        await fleet.scale(2)
        fleet.welcome = of_the_lost
        fleet.lose(fleet.healthy[0], LOST)
        await until(lambda: fleet.states.get("stale") and not fleet._replacements.may_begin)
        for _ in range(2):
            with pytest.raises(LearnerError):
                await fleet.scatter("answer", items(2))
        await fleet.change_weights(of_another, "load")
        await fleet.replaced()
        assert workers(await fleet.scatter("answer", items(2))) == [1, 2], "it has waited for the other learner"
        assert fleet._restarts.num_taken == 1 and "restart_failed" not in told.kinds()
        assert_books(fleet, world)

    drive(body)


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_newcomer_does_not_wait_for_a_learner_for_ever(is_stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        async def of_the_lost(_: Any) -> None:
            raise LearnerError("learner", found="a gang that was ended", needed="living ranks", action="Again.")

        await fleet.scale(1)
        fleet.welcome = of_the_lost
        growing = asyncio.create_task(fleet.scale(2))
        await until(lambda: fleet.states.get("stale") == 1)
        if is_stopped:
            await fleet.stop()
        else:
            monkeypatch.setattr(fleet, "limits", FleetLimits(0.05, 0.05, 0))
            fleet._notice()
        with pytest.raises(ReplicaLostError if is_stopped else LearnerError):
            await growing
        assert not world.actors[1].alive

    drive(body, max_restarts=0)


def test_a_suspect_whose_learner_is_lost_waits_for_the_next_one() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        async def of_the_lost(_: Any) -> None:
            raise LearnerError("learner", found="a gang that was ended", needed="living ranks", action="Again.")

        async def of_another(_: Any) -> None:
            """It has weights."""

        await fleet.scale(2)
        fleet.welcome = of_the_lost
        suspect = fleet.healthy[0]
        fleet.suspect(suspect, DeadlineError("echo[0].probe", found="no answer", needed="one", action="None."))
        await fleet.broadcast("load")
        answering = asyncio.create_task(fleet.answered(suspect))
        await until(lambda: fleet.states.get("stale") == 1)
        with pytest.raises(LearnerError):
            await fleet.repair()
        fleet.welcome = of_another
        await answering
        assert fleet.states == {"healthy": 2} and told.kinds()[-1] == "replica_recovered"

    drive(body)


def test_a_newcomer_whose_learner_is_lost_while_another_takes_over_asks_that_one() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        async def of_another(_: Any) -> None:
            """It has weights."""

        async def of_the_lost(_: Any) -> None:
            fleet.welcome = of_another
            raise LearnerError("learner", found="a gang that was ended", needed="living ranks", action="Again.")

        await fleet.scale(2)
        fleet.welcome = of_the_lost
        fleet.lose(fleet.healthy[0], LOST)
        await fleet.replaced()
        assert workers(await fleet.scatter("answer", items(2))) == [1, 2]
        assert told.of("restart_failed") == [] and fleet._restarts.num_taken == 1

    drive(body)


def test_a_stop_ends_replacements_that_are_under_way() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(3)
        world.never.add("start")
        fleet.lose(fleet.healthy[0], LOST)
        await starting(world, 3)
        fleet.lose(fleet.healthy[0], LOST)  # its task has not begun
        await fleet.stop()
        assert fleet.states == {} and "restart_failed" not in told.kinds()

    drive(body)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.newcomers, "_FIRST_PAUSE_S", 0.01)


@pytest.mark.usefixtures("short_pauses")
def test_newcomers_that_never_ran_use_no_restarts() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        world.num_unborn = 2
        await fleet.scale(2)
        assert len(told.of("start_repeated")) == 2 and told.of("replica_lost") == []
        world.num_unborn = 3
        fleet.lose(fleet.healthy[0], LOST)
        await fleet.replaced()
        assert fleet.states == {"healthy": 2} and fleet._restarts.num_taken == 1
        assert len(told.of("start_repeated")) == 5 and "restart_failed" not in told.kinds()
        assert [joined.get("replaces") for joined in told.of("replica_joined")] == [None, None, 0]
        assert_books(fleet, world)

    drive(body, max_restarts=1)


@pytest.mark.usefixtures("short_pauses")
def test_newcomers_that_never_run_are_given_up_after_the_time_of_a_start() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(1)
        fleet.limits = FleetLimits(1.0, 5.0, 1)
        world.num_unborn = 1000
        fleet.lose(fleet.healthy[0], LOST)
        await fleet.replaced()
        assert len(told.of("restart_failed")) == 1, "that was a restart, and the last"
        assert 1 <= len(told.of("start_repeated")) <= 7, "with pauses that grow"

    drive(body, max_restarts=1)


@pytest.mark.usefixtures("short_pauses")
def test_a_stop_ends_newcomers_that_are_to_be_created_again() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        world.num_unborn = 1000
        growing = asyncio.create_task(fleet.scale(1))
        await until(lambda: told.kinds().count("start_repeated") >= 2)
        await fleet.stop()
        with pytest.raises(ReplicaLostError, match="stopped meanwhile"):
            await growing
        assert "restart_failed" not in told.kinds()

    drive(body)


def test_a_node_with_half_of_a_large_fleet_is_replaced_as_a_whole_twice() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        await fleet.scale(16)
        for num_taken in (8, 16):
            for replica in fleet.healthy[:8]:
                fleet.lose(replica, LOST)
            await fleet.replaced()
            assert fleet.states == {"healthy": 16} and fleet._restarts.num_taken == num_taken
        fleet.lose(fleet.healthy[0], LOST)
        assert told.of("restarts_used_up")[0]["replicas"] == 16

    drive(body, max_restarts=1)


@pytest.mark.parametrize("num_failed", [1, 3])
def test_replicas_that_are_lost_in_their_first_start_are_started_again(num_failed: int) -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        for index in range(num_failed):
            world.errors["start", index] = CHOKED
        await fleet.scale(2)
        assert fleet.states == {"healthy": 2} and fleet._restarts.num_taken == num_failed
        assert len(told.of("replica_lost")) == min(num_failed, 2)
        assert len(told.of("replica_lost") + told.of("restart_failed")) == num_failed
        assert sum("replaces" in joined for joined in told.of("replica_joined")) == min(num_failed, 2)
        assert_books(fleet, world)

    drive(body)


def test_first_starts_that_use_the_restarts_up_end_the_start_of_the_fleet() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        for index in (1, 2, 3):
            world.errors["start", index] = CHOKED
        with pytest.raises(EngineError, match="chokes"):
            await fleet.scale(2)
        assert "restarts_used_up" in told.kinds() and len(world.actors) == 4
        assert fleet.num_missing == 0, "what could not join is not asked for again"

    drive(body, max_restarts=1)


@pytest.mark.parametrize("cause", ["worker", "placement"])
def test_what_no_restart_mends_ends_the_first_start_at_once(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        if cause == "worker":
            world.errors["start", 0] = raised(TypeError("t"))
        else:

            def no_room(index: int) -> Any:
                raise PlacementError("echo", found="no room", needed="some", action="None.")

            monkeypatch.setattr(fleet, "_spawn", no_room)
        with pytest.raises(RlhfError) as caught:
            await fleet.scale(1)
        assert isinstance(caught.value, WorkerError if cause == "worker" else PlacementError)
        assert fleet._restarts.num_taken == 0 and told == []

    drive(body)
