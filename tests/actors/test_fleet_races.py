"""Fleets over fake actors that answer and die at random moments: any interleaving keeps the books straight."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayTaskError

import actors.newcomers
from actors.fleet import Fleet, FleetLimits
from rlhf.errors import (
    DataError,
    EngineError,
    LearnerError,
    PublicationError,
    ReplicaLostError,
    RlhfError,
    WorkerError,
)
from tests.actors.fleets import Answer, Item, items
from tests.actors.local_ray import LocalRef, LocalStream


class FakeActor:
    """An actor whose calls take a random while, and which may die at any of them."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.alive = True
        self.pending: list[LocalRef | LocalStream] = []
        self.stopped = False

    def __getattr__(self, name: str) -> FakeMethod:
        return FakeMethod(self, name)

    def submit(self, reply: LocalRef | LocalStream, method: str, args: tuple[Any, ...]) -> Any:
        if not self.alive:
            reply.settle(ActorDiedError())
            return reply
        if method == "__ray_ready__":
            if self.world.num_unborn:
                self.world.num_unborn -= 1
                self.die()
            reply.settle(True if self.alive else ActorDiedError())
            return reply
        self.pending.append(reply)
        if method in self.world.never:
            return reply
        draw = self.world.draw
        if isinstance(reply, LocalStream):
            for i, item in enumerate(args[0]):
                self.world.later(0.001 * (i + 1), lambda item=item: self._deliver(reply, item))
        delay = 0.001 * (draw.randrange(4) + (len(args[0]) + 1 if isinstance(reply, LocalStream) else 0))
        if draw.random() < self.world.mortality and method != "stop":
            self.world.later(delay / 2, self.die)
        self.world.later(delay, lambda: self._finish(reply, method, args))
        return reply

    def _deliver(self, reply: LocalStream, item: Item) -> None:
        if self.alive:
            reply.deliver(Answer(item.uid, self.index))

    def _finish(self, reply: LocalRef | LocalStream, method: str, args: tuple[Any, ...]) -> None:
        if self.alive:
            self.pending.remove(reply)
            if method == "stop" and self.pending:
                self.world.cut_short.append(self.index)
            answers = [Answer(item.uid, self.index) for item in args[0]] if method == "answer" else None
            reply.settle(self.world.errors.get((method, self.index), answers))

    def die(self) -> None:
        self.alive = False
        for reply in self.pending:
            reply.settle(ActorDiedError())
        self.pending = []


@dataclass
class FakeMethod:
    """What ``handle.method`` gives: ``remote`` and ``options(...).remote``."""

    actor: FakeActor
    name: str
    reply: type = LocalRef

    def options(self, *, num_returns: str) -> FakeMethod:
        assert num_returns == "streaming"
        return FakeMethod(self.actor, self.name, LocalStream)

    def remote(self, *args: Any) -> Any:
        return self.actor.submit(self.reply(), self.name, args)


@dataclass
class World:
    """Everything random, and every actor ever made."""

    draw: random.Random
    mortality: float
    actors: list[FakeActor] = field(default_factory=list)
    retired: list[FakeActor] = field(default_factory=list)
    cut_short: list[int] = field(default_factory=list)
    never: set[str] = field(default_factory=set)
    """Methods that are not answered."""
    num_unborn: int = 0
    """Actors that will die before they have run."""
    errors: dict[tuple[str, int], RlhfError | RayTaskError] = field(default_factory=dict)
    """What a method raises on one actor."""

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    def later(self, seconds: float, action: Any) -> None:
        self.loop.call_later(seconds, action)

    def spawn(self, index: int) -> FakeActor:
        self.actors.append(FakeActor(self, index))
        return self.actors[-1]


async def scatter_often(fleet: Fleet, world: World, times: int) -> None:
    for _ in range(times):
        num_items = world.draw.randrange(1, 6)
        if world.draw.random() < 0.5:
            answers = await fleet.scatter("answer", items(num_items))
        else:
            answers = await fleet.scatter_stream("stream", items(num_items))
        assert [answer.uid for answer in answers] == [f"p{i}" for i in range(num_items)]
        await asyncio.sleep(0.001 * world.draw.randrange(3))


async def scale_often(fleet: Fleet, world: World, sizes: list[int]) -> None:
    for size in sizes:
        await asyncio.sleep(0.001 * world.draw.randrange(5))
        await fleet.scale(size)


async def publish_often(fleet: Fleet, world: World, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0.001 * world.draw.randrange(5))
        try:
            await fleet.broadcast("load")
            await fleet.broadcast("load")
        except PublicationError:
            assert not fleet.healthy
        await fleet.repair()


def assert_books(fleet: Fleet, world: World) -> None:
    """No actor is forgotten, and nobody is thought busy."""
    healthy = fleet.healthy
    assert all(replica.in_flight == 0 and replica.idle.is_set() for replica in healthy)
    assert fleet._replicas == healthy == sorted(healthy, key=lambda replica: replica.index)
    assert {r.handle for r in healthy} == set(world.actors) - set(world.retired), "every other actor is ended"


def drive(seed: int, mortality: float, sizes: list[int], limits: FleetLimits) -> list[BaseException]:
    """Runs everything at once and returns the failures that callers saw; the books are straight either way."""

    async def body() -> list[BaseException]:
        world = World(random.Random(seed), 0.0)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, limits)
        async with asyncio.timeout(20):
            await fleet.scale(2)
            world.mortality = mortality
            work = [scatter_often(fleet, world, 4), scatter_often(fleet, world, 4)]
            work += [scale_often(fleet, world, sizes), publish_often(fleet, world, 3)]
            results = await asyncio.gather(*work, return_exceptions=True)
            failures = [result for result in results if isinstance(result, BaseException)]
            world.mortality = 0.0
            if not failures:  # a failure lets the other shares go, though their workers may not know
                assert world.cut_short == [], "a leaver was stopped in the middle of its work"
                await fleet.repair()
                await fleet.replaced()
                assert len(fleet.healthy) == (sizes or [2])[-1] - fleet.num_missing
                assert not fleet.num_missing or not fleet._restarts.left, "it goes on with fewer once they are used up"
                await scatter_often(fleet, world, 2)
            else:
                assert fleet._restarts.num_taken <= limits.max_restarts * max([2, *sizes])

            await fleet.replaced()
            assert_books(fleet, world)
            await fleet.stop()
            assert not any(actor.alive for actor in world.actors)
            assert len(world.retired) >= len(world.actors)
        late = asyncio.all_tasks() - {asyncio.current_task()}  # a placement that was given up ends in its thread
        assert not late or not (await asyncio.wait(late, timeout=5))[1]
        return failures

    return asyncio.run(body())


def only_lost(failures: list[BaseException]) -> bool:
    """Whether callers saw no other failure than that of a replica that could not be replaced any more."""
    return all(isinstance(failure, ReplicaLostError) for failure in failures)


@pytest.fixture(autouse=True, scope="module")
def fake_kill():
    patch = pytest.MonkeyPatch()
    patch.setattr(actors.newcomers, "kill", lambda actor: actor.die())
    yield
    patch.undo()


SIZES = st.lists(st.integers(1, 4), max_size=4)


@given(st.integers(0, 2**32), SIZES)
@settings(max_examples=15, deadline=None)
def test_without_deaths_nothing_is_ever_dispatched_twice(seed: int, sizes: list[int]) -> None:
    assert drive(seed, 0.0, sizes, FleetLimits(5.0, 5.0, max_restarts=0)) == []


@given(st.integers(0, 2**32), SIZES, st.sampled_from([0.02, 0.1, 0.3]))
@settings(max_examples=15, deadline=None)
def test_with_deaths_calls_come_through_or_fail_as_lost_and_no_actor_is_forgotten(
    seed: int, sizes: list[int], mortality: float
) -> None:
    assert only_lost(drive(seed, mortality, sizes, FleetLimits(5.0, 5.0, max_restarts=1000)))
    assert only_lost(drive(seed, mortality, sizes, FleetLimits(5.0, 5.0, max_restarts=2)))


def test_nobody_takes_a_replica_that_is_starting_for_a_lost_one() -> None:
    async def body() -> None:
        world = World(random.Random(0), 0.0)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, FleetLimits(5.0, 5.0))
        await fleet.scale(1)
        world.never = {"start"}
        growing = asyncio.create_task(fleet.scale(2))
        while len(world.actors) < 2 or not world.actors[1].pending:
            assert fleet.num_missing == 0
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert fleet.num_missing == 0, "a publication has nobody to wait for"
            await fleet.broadcast("load")
        world.actors[1].die()
        with pytest.raises(RlhfError):
            await growing
        assert len(fleet.healthy) == 1 and fleet.num_missing == 0
        assert_books(fleet, world)
        await fleet.stop()

    asyncio.run(body())


def test_a_fleet_that_is_stopped_in_the_middle_of_a_replacement_starts_no_further_actor() -> None:
    async def body() -> None:
        world, events = World(random.Random(0), 0.0), []
        limits = FleetLimits(5.0, 5.0, max_restarts=3)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda kind, **_: events.append(kind), limits)
        await fleet.scale(1)
        world.never.add("start")
        world.actors[0].die()
        work = asyncio.create_task(fleet.scatter("answer", items(1)))
        while len(world.actors) < 2 or not world.actors[1].pending:
            await asyncio.sleep(0.001)
        await fleet.stop()
        with pytest.raises(ReplicaLostError):
            await work
        assert len(world.actors) == 2 and set(world.retired) == set(world.actors)
        assert not any(actor.alive for actor in world.actors)
        assert events.count("replica_joined") == 1

    asyncio.run(asyncio.wait_for(body(), 20))


def test_a_broadcast_of_what_cannot_be_done_says_so_and_blames_no_replica() -> None:
    async def body() -> None:
        world = World(random.Random(0), 0.0)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, FleetLimits(5.0, 5.0, 3))
        await fleet.scale(2)
        fault = DataError("prompt p0", found="no field", needed="one", action="Add it.")
        world.errors[("load", 0)] = fault
        with pytest.raises(DataError) as caught:
            await fleet.broadcast("load")
        assert caught.value is fault
        assert [replica.index for replica in fleet.healthy] == [0, 1]
        world.errors[("load", 1)] = EngineError("echo[1]", found="a dead engine", needed="a living one", action="No.")
        with pytest.raises(DataError):
            await fleet.broadcast("load")
        assert [replica.index for replica in fleet.healthy] == [0], "one that failed by itself still leaves"
        await fleet.stop()

    asyncio.run(asyncio.wait_for(body(), 20))


def raised(cause: Exception) -> RayTaskError:
    """What Ray makes of an exception in a worker."""
    return RayTaskError("answer", f"Traceback ...\n{cause!r}", cause, proctitle="worker", pid=1, ip="127.0.0.1")


@pytest.mark.parametrize("cause", [KeyError("k"), TypeError("t"), ValueError("v"), AssertionError(), RecursionError()])
def test_a_defect_of_the_worker_ends_the_call_with_its_name_and_costs_no_restart(cause: Exception) -> None:
    async def body() -> None:
        world, events = World(random.Random(0), 0.0), []
        limits = FleetLimits(5.0, 5.0, max_restarts=3)
        fleet = Fleet("judge", world.spawn, world.retired.append, lambda kind, **_: events.append(kind), limits)
        await fleet.scale(2)
        world.errors["answer", 1] = raised(cause)
        with pytest.raises(WorkerError, match=rf"^judge\[1\]\.answer: (.|\n)*{type(cause).__name__}"):
            await fleet.scatter("answer", items(4))
        assert events == ["replica_joined"] * 2 and fleet._restarts.num_taken == 0
        await fleet.stop()

    asyncio.run(asyncio.wait_for(body(), 20))


@pytest.mark.parametrize("cause", [OSError("disk"), ConnectionResetError(), RuntimeError("CUDA error"), MemoryError()])
def test_what_a_machine_does_to_a_worker_costs_a_restart(cause: Exception) -> None:
    async def body() -> None:
        world, events = World(random.Random(0), 0.0), []
        limits = FleetLimits(5.0, 5.0, max_restarts=1)
        fleet = Fleet("judge", world.spawn, world.retired.append, lambda kind, **_: events.append(kind), limits)
        await fleet.scale(1)
        world.errors["answer", 0] = raised(cause)
        assert [answer.worker for answer in await fleet.scatter("answer", items(2))] == [1, 1]
        world.errors["answer", 1] = raised(cause)
        with pytest.raises(ReplicaLostError, match=r"^judge\[1\]\.answer"):
            await fleet.scatter("answer", items(2))
        assert events[-2:] == ["replica_lost", "restarts_used_up"]
        await fleet.stop()

    asyncio.run(asyncio.wait_for(body(), 20))


def test_losses_that_lie_further_apart_than_the_window_are_made_good_for_ever() -> None:
    async def body() -> None:
        world = World(random.Random(0), 0.0)
        limits = FleetLimits(5.0, 5.0, max_restarts=1, restart_window_s=0.05)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, limits)
        await fleet.scale(1)
        for num_lost in range(1, 5):
            world.actors[-1].die()
            answers = await fleet.scatter("answer", items(1))
            assert [answer.worker for answer in answers] == [num_lost]
            await asyncio.sleep(0.06)
        await fleet.stop()

    asyncio.run(asyncio.wait_for(body(), 20))


def test_rare_deaths_usually_come_through() -> None:
    lives = [drive(seed, 0.02, [3, 1, 2], FleetLimits(5.0, 5.0, max_restarts=1000)) for seed in range(5)]
    assert sum(failures == [] for failures in lives) >= 3


@pytest.mark.parametrize("newcomer_first", [True, False])
def test_a_newcomer_during_a_change_of_weights_serves_the_new_ones(newcomer_first: bool) -> None:
    async def body() -> None:
        world = World(random.Random(0), 0.0)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, FleetLimits())
        await fleet.scale(1)
        holds: dict[FakeActor, str] = {}
        gate = asyncio.Event()

        def welcome_to(weights: str):
            async def welcome(handle: FakeActor) -> None:
                if weights == "old":
                    await gate.wait()
                holds[handle] = weights

            return welcome

        async def broadcast(method: str, weights: str) -> None:
            called = [replica.handle for replica in fleet.healthy]
            await gate.wait()
            holds.update(dict.fromkeys(called, weights))

        fleet.broadcast = broadcast  # type: ignore[assignment, method-assign]
        fleet.welcome = welcome_to("old")
        moves = [lambda: fleet.scale(2), lambda: fleet.change_weights(welcome_to("new"), "load_folder", "new")]
        tasks = []
        for move in moves if newcomer_first else moves[::-1]:
            tasks.append(asyncio.create_task(move()))
            await asyncio.sleep(0.05)
        gate.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        assert [holds[replica.handle] for replica in fleet.healthy] == ["new", "new"]
        await fleet.stop()

    asyncio.run(body())


def test_a_welcome_that_fails_for_its_learner_costs_one_restart_and_not_all() -> None:
    async def body() -> None:
        world = World(random.Random(0), 0.0)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, FleetLimits(5.0, 5.0, 3))
        await fleet.scale(1)
        gone = LearnerError("learner", found="a gang that was ended", needed="living ranks", action="Again.")

        async def welcome(_: FakeActor) -> None:
            raise gone

        fleet.welcome = welcome
        world.actors[0].die()
        with pytest.raises(LearnerError):
            await fleet.scatter("answer", items(1))
        assert fleet._restarts.num_taken == 1, "the next newcomer would have asked the same dead gang"
        await fleet.stop()

    asyncio.run(asyncio.wait_for(body(), 20))


def test_a_change_of_weights_that_finds_nobody_is_made_good_by_a_newcomer() -> None:
    async def body() -> None:
        world = World(random.Random(0), 0.0)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, FleetLimits(5.0, 5.0, 3))
        await fleet.scale(1)
        welcomed: list[FakeActor] = []

        async def welcome(actor: FakeActor) -> None:
            welcomed.append(actor)

        world.actors[0].die()
        await fleet.change_weights(welcome, "load")
        assert [replica.handle for replica in fleet.healthy] == welcomed == [world.actors[1]]
        await fleet.stop()
        with pytest.raises(PublicationError):
            await fleet.change_weights(welcome, "load")

    asyncio.run(asyncio.wait_for(body(), 20))


def test_a_call_that_finds_nobody_waits_for_the_replacement_that_another_call_has_asked_for() -> None:
    async def body() -> None:
        world = World(random.Random(0), 0.0)
        fleet = Fleet("echo", world.spawn, world.retired.append, lambda *_, **__: None, FleetLimits(5.0, 5.0, 3))
        await fleet.scale(1)
        world.actors[0].die()
        first = asyncio.create_task(fleet.scatter("answer", items(1)))
        while fleet.healthy:
            await asyncio.sleep(0)
        second = await fleet.scatter("answer", items(1))
        assert [answer.worker for answer in [*await first, *second]] == [1, 1]
        await fleet.stop()

    asyncio.run(asyncio.wait_for(body(), 20))
