"""The states of a replica: what may follow what, who gets work, and what a suspect misses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import actors.newcomers
from actors.fleet import Fleet, FleetLimits
from actors.replicas import TRANSITIONS, Replica, ReplicaState
from rlhf.errors import DeadlineError, PublicationError, ReplicaLostError
from tests.actors.fleets import items
from tests.actors.test_fleet_races import World, assert_books

OVERDUE = DeadlineError("echo[0].probe", found="no answer", needed="one", action="None.")
LOST = ReplicaLostError("echo[0].probe", found="no answer to two probes", needed="one", action="None.")


@pytest.fixture(autouse=True)
def fake_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.newcomers, "kill", lambda actor: actor.die())


@pytest.mark.parametrize("before", ReplicaState)
@pytest.mark.parametrize("after", ReplicaState)
def test_only_the_changes_of_the_table_are_made(before: ReplicaState, after: ReplicaState) -> None:
    replica = Replica(0, state=before)
    if after in TRANSITIONS[before]:
        replica.become(after)
        assert replica.state is after
    else:
        with pytest.raises(AssertionError, match=f"from {before} to {after}"):
            replica.become(after)


def test_every_state_can_be_reached_and_only_dead_ones_are_left_for_good() -> None:
    reached, new = set(), {ReplicaState.STARTING}
    while new:
        reached |= new
        new = {after for before in new for after in TRANSITIONS[before]} - reached
    assert reached == set(ReplicaState) == set(TRANSITIONS)
    assert all(ReplicaState.DEAD in after for before, after in TRANSITIONS.items() if before is not ReplicaState.DEAD)


class Told(list):
    def __call__(self, kind: str, **fields: Any) -> None:
        self.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for found, fields in self if found == kind]


def drive(
    size: int,
    body: Callable[[Fleet, World, Told], Awaitable[None]],
    limits: FleetLimits | None = None,
    *,
    in_turn: bool = False,
) -> None:
    """Runs ``body`` on a fleet of fake actors that answer at once, and looks at its books afterwards."""

    async def run() -> None:
        world, told = World(random.Random(0), 0.0), Told()
        fleet = Fleet(
            "echo", world.spawn, world.retired.append, told, limits or FleetLimits(5.0, 5.0, 3), in_turn=in_turn
        )
        async with asyncio.timeout(20):
            await fleet.scale(size)
            await body(fleet, world, told)
            assert_books(fleet, world)
            await fleet.stop()

    asyncio.run(run())


def workers(answers: list[Any]) -> list[int]:
    return [answer.worker for answer in answers]


def test_a_suspect_gets_no_work_until_it_answers() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        suspect = fleet.healthy[0]
        fleet.suspect(suspect, OVERDUE)
        assert fleet.states == {"suspect": 1, "healthy": 1} and fleet.num_missing == 0
        assert workers(await fleet.scatter("answer", items(4))) == [1] * 4
        await fleet.answered(suspect)
        assert workers(await fleet.scatter("answer", items(4))) == [0, 0, 1, 1]
        assert told.kinds()[2:] == ["replica_suspect", "replica_recovered"]

    drive(2, body)


def test_a_suspect_that_missed_new_weights_is_stale_until_it_is_welcomed_to_them() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        suspect = fleet.healthy[0]
        seen: list[tuple[Any, ReplicaState, int]] = []

        async def welcome(handle: Any) -> None:
            seen.append((handle, suspect.state, len(fleet.healthy)))

        fleet.welcome = welcome
        fleet.suspect(suspect, OVERDUE)
        assert len(await fleet.broadcast("load")) == 1, "it takes no part"
        await fleet.answered(suspect)
        assert seen == [(suspect.handle, ReplicaState.STALE, 1)]
        assert suspect.state is ReplicaState.HEALTHY and not suspect.missed_broadcast
        fleet.suspect(suspect, OVERDUE)
        await fleet.answered(suspect)
        assert len(seen) == 1, "nothing was missed this time"

    drive(2, body)


def test_a_welcome_that_fails_ends_a_stale_replica_and_another_takes_its_place() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        suspect = fleet.healthy[0]

        async def welcome(handle: Any) -> None:
            if handle is suspect.handle:
                raise PublicationError("weights", found="half", needed="all", action="Again.")

        fleet.welcome = welcome
        fleet.suspect(suspect, OVERDUE)
        await fleet.broadcast("load")
        await fleet.answered(suspect)
        await fleet.replaced()
        assert [replica.index for replica in fleet.healthy] == [1, 2]
        assert "replica_recovered" not in told.kinds()

    drive(2, body)


def test_work_waits_for_the_only_replica_while_it_is_suspect() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        [suspect] = fleet.healthy
        fleet.suspect(suspect, OVERDUE)
        work = asyncio.create_task(fleet.scatter("answer", items(2)))
        settled = asyncio.create_task(fleet.settled())
        await asyncio.sleep(0.05)
        assert not work.done() and not settled.done()
        await fleet.answered(suspect)
        assert workers(await work) == [0, 0]
        await settled

    drive(1, body)


def test_the_work_of_a_suspect_that_is_lost_goes_to_its_replacement_which_is_started_once() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        [suspect] = fleet.healthy
        suspect.unfinished_tokens = 70
        world.never.add("answer")
        work = asyncio.create_task(fleet.scatter("answer", items(2)))
        await asyncio.sleep(0.01)
        world.never.clear()
        fleet.suspect(suspect, OVERDUE)
        fleet.lose(suspect, LOST)
        assert workers(await work) == [1, 1]
        assert fleet.states == {"healthy": 1}
        [lost] = told.of("replica_lost")
        assert lost["detect_s"] >= 0.01 and (lost["lost_steps"], lost["lost_tokens"]) == (0, 70)
        joined = told.of("replica_joined")
        assert "recover_s" not in joined[0] and joined[1]["replaces"] == 0
        assert joined[1]["recover_s"] >= lost["detect_s"]
        assert len(joined) == 2

    drive(1, body)


def test_a_lost_replica_is_restarting_until_its_replacement_serves() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        world.never.add("start")
        fleet.lose(fleet.healthy[0], LOST)
        while len(world.actors) < 3 or not world.actors[2].pending:
            await asyncio.sleep(0.001)
        assert fleet.states == {"healthy": 1, "restarting": 1, "starting": 1} and fleet.num_missing == 0
        world.never.clear()
        world.actors[2].pending[0].settle(None)
        await fleet.replaced()
        assert fleet.states == {"healthy": 2}

    drive(2, body)


def test_a_fleet_that_takes_turns_on_its_gpu_replaces_only_for_whoever_waits_for_it() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        fleet.lose(fleet.healthy[0], LOST)
        assert fleet.states == {"dead": 1} and fleet.num_missing == 1
        world.never.add("start")
        work = asyncio.create_task(fleet.scatter("answer", items(1)))
        while len(world.actors) < 2 or not world.actors[1].pending:
            await asyncio.sleep(0.001)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert not world.actors[1].alive and fleet.states == {"dead": 1}, "another phase has the GPU now"
        world.never.clear()
        assert workers(await fleet.scatter("answer", items(1))) == [2]

    drive(1, body, in_turn=True)


def test_a_suspect_leaves_before_a_healthy_replica() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        fleet.suspect(fleet.healthy[0], OVERDUE)
        await fleet.scale(1)
        assert [replica.index for replica in fleet.healthy] == [1]

    drive(2, body)


def test_a_loss_is_replaced_while_newcomers_wait_for_room() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        world.never.add("start")
        growing = asyncio.create_task(fleet.scale(3))
        while len(world.actors) < 3 or not all(actor.pending for actor in world.actors[1:]):
            await asyncio.sleep(0.001)
        waiting = [actor.pending[0] for actor in world.actors[1:]]
        world.never.clear()
        fleet.lose(fleet.healthy[0], LOST)
        assert workers(await fleet.scatter("answer", items(2))) == [3, 3], "nobody waited for the newcomers"
        for start in waiting:
            start.settle(None)
        await growing
        assert [replica.index for replica in fleet.healthy] == [1, 2, 3]

    drive(1, body)


def test_the_backlog_is_what_has_not_come_yet() -> None:
    async def body(fleet: Fleet, world: World, told: Told) -> None:
        world.never.add("answer")
        waiting = asyncio.create_task(fleet.scatter("answer", items(3)))
        await asyncio.sleep(0.01)
        assert fleet.backlog == 3
        world.never.clear()
        await fleet.scatter_stream("stream", items(4))
        assert fleet.backlog == 3
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert fleet.backlog == 0
        for actor in world.actors:
            actor.pending.clear()

    drive(2, body)
