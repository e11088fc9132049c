"""An item that takes every replica down that works on it is given up, and costs the fleet none of its restarts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import actors.newcomers
from actors.fleet import Fleet, FleetLimits
from actors.roles import FleetGenerator, FleetJudge, FleetScorer
from rlhf.errors import EngineError, ReplicaLostError, RlhfError
from tests.actors.fleets import Item, items
from tests.actors.local_ray import LocalRef, LocalStream
from tests.actors.test_fleet_races import FakeActor, World
from tests.actors.test_replica_states import Told
from tests.fakes import make_group


@pytest.fixture(autouse=True)
def fake_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.newcomers, "kill", lambda actor: actor.die())


class FragileActor(FakeActor):
    """Dies of, or raises an error for, items of certain uids; with ``stream`` those before them are delivered."""

    def submit(self, reply: LocalRef | LocalStream, method: str, args: tuple[Any, ...]) -> Any:
        world: Any = self.world
        bad = [item for item in args[0] if item.uid in world.poison] if args else []
        if not (self.alive and bad and method in ("answer", "stream", "score", "judge")):
            return super().submit(reply, method, args)
        self.pending.append(reply)
        if isinstance(reply, LocalStream):
            for item in args[0][: args[0].index(bad[0])]:
                self._deliver(reply, item)
        error = world.poison[bad[0].uid]
        self.world.later(0.001, self.die if error is None else lambda: reply.settle(error))
        return reply


class FragileWorld(World):
    poison: dict[str, Exception | None]

    def spawn(self, index: int) -> FakeActor:
        self.actors.append(FragileActor(self, index))
        return self.actors[-1]


def drive(
    size: int,
    poison: dict[str, Exception | None],
    body: Callable[[Fleet, FragileWorld, Told], Awaitable[None]],
    max_restarts: int = 3,
) -> None:
    async def run() -> None:
        world, told = FragileWorld(random.Random(0), 0.0), Told()
        world.poison = poison
        limits = FleetLimits(5.0, 5.0, max_restarts)
        fleet = Fleet("echo", world.spawn, world.retired.append, told, limits)
        async with asyncio.timeout(20):
            await fleet.scale(size)
            await body(fleet, world, told)
            await fleet.stop()

    asyncio.run(run())


REFUSED = EngineError("echo", found="an engine that chokes on it", needed="a prompt", action="None.")


@pytest.mark.parametrize("error", [None, REFUSED], ids=["crash", "refusal"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_the_one_item_of_a_stream_is_left_out_and_the_others_come(place: int, error: Exception | None) -> None:
    async def body(fleet: Fleet, world: FragileWorld, told: Told) -> None:
        found = await fleet.scatter_stream("stream", items(4), may_lack=True)
        assert [answer.uid for answer in found] == [f"p{i}" for i in range(4) if i != place]
        assert [fields["uid"] for fields in told.of("item_poisoned")] == [f"p{place}"]
        assert fleet._restarts.num_taken == 0, "no machine was to blame"
        assert len(fleet.healthy) == 1 and fleet.backlog == 0

    drive(1, {f"p{place}": error}, body)


def test_an_item_that_was_alone_twice_is_given_up_without_a_third_replica() -> None:
    async def body(fleet: Fleet, world: FragileWorld, told: Told) -> None:
        assert await fleet.scatter_stream("stream", items(1), may_lack=True) == []
        assert len(told.of("replica_lost")) == 2 and fleet._restarts.num_taken == 0

    drive(1, {"p0": None}, body)


def test_several_poisoned_items_among_many_replicas_are_each_found() -> None:
    async def body(fleet: Fleet, world: FragileWorld, told: Told) -> None:
        found = await fleet.scatter("answer", items(9), missing=lambda item, why: (item.uid, why))
        assert [answer if isinstance(answer, tuple) else answer.uid for answer in found][:1] == ["p0"]
        bad = {place: answer for place, answer in enumerate(found) if isinstance(answer, tuple)}
        assert {place: answer[0] for place, answer in bad.items()} == {1: "p1", 2: "p2", 7: "p7"}
        assert all("given up after it failed echo" in answer[1] for answer in bad.values())
        assert fleet._restarts.num_taken == 0 and fleet.backlog == 0
        await fleet.replaced()
        assert len(fleet.healthy) == 3

    drive(3, {"p1": None, "p2": REFUSED, "p7": None}, body, max_restarts=8)


def test_two_losses_that_had_nothing_to_do_with_the_items_leave_none_out() -> None:
    async def body(fleet: Fleet, world: FragileWorld, told: Told) -> None:
        work = asyncio.create_task(fleet.scatter_stream("stream", items(3), may_lack=True))
        for number in range(2):
            while len(world.actors) <= number or not any(
                isinstance(reply, LocalStream) for reply in world.actors[number].pending
            ):
                await asyncio.sleep(0)
            world.actors[number].die()
        assert [answer.uid for answer in await work] == ["p0", "p1", "p2"]
        assert told.of("item_poisoned") == [] and fleet._restarts.num_taken == 2

    drive(1, {}, body)


def test_without_a_stand_in_the_second_failure_is_raised() -> None:
    async def body(fleet: Fleet, world: FragileWorld, told: Told) -> None:
        for work in (fleet.scatter("answer", items(2)), fleet.scatter_stream("stream", items(2))):
            with pytest.raises(ReplicaLostError):
                await work
        assert told.of("item_poisoned") == []

    drive(1, {"p0": None}, body, max_restarts=5)


def test_losses_that_go_on_end_the_work_with_the_restarts() -> None:
    async def body(fleet: Fleet, world: FragileWorld, told: Told) -> None:
        with pytest.raises(RlhfError):
            await fleet.scatter_stream("stream", items(3), may_lack=True)
        assert "restarts_used_up" in told.kinds()

    drive(1, {"p1": None}, body, max_restarts=1)


def meter(role: str, tokens: int, seconds: float) -> None:
    pass


def test_a_group_that_cannot_be_judged_has_no_score_and_one_that_cannot_be_drawn_no_group() -> None:
    group = make_group("p0", lengths=(2, 3))

    async def body(fleet: Fleet, world: FragileWorld, told: Told) -> None:
        [scores] = await FleetScorer("scorer", fleet, meter).score([group])
        assert [score.value for score in scores] == [None, None] and "given up" in scores[0].error
        [judgement] = await FleetJudge(fleet, "training", meter).judge([group])
        assert judgement.num_verdicts == len(judgement.errors) == 2
        assert [score.value for score in judgement.scores] == [None, None]
        prompts: Any = [Item("p0")]
        assert await FleetGenerator(fleet, meter).generate(prompts, num_samples=2, version=0) == []

    drive(1, {"p0": None}, body)
