"""Publications beside joins and hangs, over simulated actors in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.calls import await_ref
from actors.fleet import Fleet, FleetLimits
from actors.gang import LearnerGang
from actors.publisher import BucketPublisher
from rlhf.errors import LearnerError, ReplicaLostError
from tests.actors.local_ray import LocalActor
from tests.actors.simulated_roles import UPDATE_TIMEOUT_S, Engine, Fault, Meeting, Rank, World
from tests.actors.test_replica_states import OVERDUE
from tests.virtual_time import DeadlockError, VirtualTimeLoop


@pytest.fixture(autouse=True)
def local_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart=True: actor.die())


def drive(body: Coroutine[Any, Any, None]) -> None:
    loop = VirtualTimeLoop()
    try:
        loop.run_until_complete(body)
    finally:
        loop.close()


class Published:
    """A generation fleet and one learner rank of one world."""

    def __init__(self) -> None:
        self.world = World([], 1, 0)
        self.events: list[str] = []
        limits = FleetLimits(600.0, 1800.0, max_restarts=3)
        self.fleet = Fleet("generation", self._spawn, self.world.retire, self._event, limits)
        self.learner()

    def learner(self) -> None:
        """Starts a learner."""
        rank = self.world.actor("learner", Rank(self.world, 0, Meeting(1)), serial=True)
        self.gang = LearnerGang("learner", [rank])

    def _spawn(self, index: int) -> LocalActor:
        return self.world.actor("generation", Engine(self.world))

    def _event(self, kind: str, **fields: Any) -> None:
        self.events.append(kind)

    def publisher(self) -> BucketPublisher:
        return BucketPublisher(
            self.gang,
            self.fleet,
            self._event,
            version=self.world.first_version,
            bucket_bytes=1000,
            timeout_s=UPDATE_TIMEOUT_S / 3,
        )

    def versions(self) -> list[int | None]:
        return [replica.handle.worker.version for replica in self.fleet.healthy]


def test_a_newcomer_that_is_welcomed_to_a_folder_when_the_learner_publishes_ends_with_the_learners_weights() -> None:
    async def body() -> None:
        run = Published()
        version = run.world.first_version

        async def welcome(actor: Any) -> None:
            await await_ref(
                actor.load_folder.remote(Path("policy"), version, 1000), timeout_s=600.0, where="generation.load_folder"
            )

        await run.fleet.scale(1)
        run.fleet.welcome = welcome
        growing = asyncio.create_task(run.fleet.scale(2))
        while not run.world.reached["generation", "load_folder"]:
            await asyncio.sleep(1.0)
        await run.publisher().publish(version + 5)
        await growing
        assert run.versions() == [version + 5] * 2
        await run.fleet.stop()

    drive(body())


def test_a_replica_that_hangs_in_a_publication_costs_itself_alone() -> None:
    async def body() -> None:
        run = Published()
        await run.fleet.scale(3)
        before = [replica.index for replica in run.fleet.healthy]
        run.world.faults.append(Fault("generation", "begin_update", "hang", after=1))
        await run.publisher().publish(run.world.first_version + 1)
        assert [replica.index for replica in run.fleet.healthy] == [0, 2], "nobody waits for the replacement"
        await run.fleet.replaced()
        assert run.versions() == [run.world.first_version + 1] * 3
        assert [replica.index for replica in run.fleet.healthy if replica.index in before] == [0, 2]
        assert run.events.count("replica_lost") == 1
        await run.fleet.stop()

    drive(body())


def test_publications_do_not_wait_for_a_replacement_that_starts_and_it_gets_the_newest_weights() -> None:
    async def body() -> None:
        run = Published()
        await run.fleet.scale(2)
        version, publisher = run.world.first_version, run.publisher()
        await publisher.publish(version)
        [lost, _] = run.fleet.healthy
        run.fleet.lose(lost, ReplicaLostError("echo", found="a death", needed="a life", action="None."))
        await publisher.publish(version + 1)
        await publisher.publish(version + 2)
        assert run.versions() == [version + 2] and run.fleet.states["starting"] == 1
        assert "publication_repair" not in run.events, "nobody was lost in one"
        while run.fleet.states["starting"]:
            await asyncio.sleep(0.1)
        await publisher.publish(version + 3)  # while the newcomer is welcomed, or just behind
        await run.fleet.replaced()
        assert run.versions() == [version + 3] * 2
        await run.fleet.stop()

    drive(body())


def test_a_learner_that_is_lost_with_a_bucket_costs_no_replica_and_the_next_one_publishes_from_the_first() -> None:
    async def body() -> None:
        run = Published()
        await run.fleet.scale(3)
        version, publisher = run.world.first_version, run.publisher()
        await publisher.publish(version)
        before = run.fleet.healthy
        suspect = before[2]
        run.fleet.suspect(suspect, OVERDUE)
        run.world.faults.append(Fault("generation", "receive_bucket", "orphan", after=2))  # one has the first bucket
        with pytest.raises(LearnerError, match="no copy"):
            await publisher.publish(version + 1)
        assert run.versions() == [None, None], "half an update is not served"
        answering = asyncio.create_task(run.fleet.answered(suspect))
        growing = asyncio.create_task(run.fleet.scale(4))
        while run.fleet.states.get("stale") != 2:
            await asyncio.sleep(1.0)
        with pytest.raises(LearnerError):
            await run.fleet.repair()
        run.learner()
        await run.publisher().publish(version + 1)
        await asyncio.gather(answering, growing)
        assert run.versions() == [version + 1] * 4 and run.fleet.healthy[:3] == before
        assert "replica_lost" not in run.events and run.fleet._restarts.num_taken == 0
        await run.fleet.stop()

    drive(body())


def test_a_newcomer_whose_learner_is_lost_with_a_bucket_is_welcomed_by_the_next_one() -> None:
    async def body() -> None:
        run = Published()
        await run.fleet.scale(1)
        version = run.world.first_version
        await run.publisher().publish(version)
        run.world.faults.append(Fault("generation", "receive_bucket", "orphan"))
        growing = asyncio.create_task(run.fleet.scale(2))
        while run.fleet.states.get("stale") != 1 or run.gang.ranks:
            await asyncio.sleep(1.0)
        assert run.versions() == [version], "who has the weights serves on"
        run.learner()
        await run.publisher().publish(version)
        await growing
        assert run.versions() == [version] * 2 and "replica_lost" not in run.events
        await run.fleet.stop()

    drive(body())


def test_a_publication_waits_where_nobody_else_serves() -> None:
    async def body() -> None:
        run = Published()
        await run.fleet.scale(1)
        run.world.faults.append(Fault("generation", "receive_bucket", "die"))
        await run.publisher().publish(run.world.first_version + 1)
        assert run.versions() == [run.world.first_version + 1]
        assert run.events.count("publication_repair") == 1
        await run.fleet.stop()

    drive(body())


def test_a_wait_that_nobody_ends_is_an_error_and_one_with_a_timeout_takes_no_time() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    async def wait_for_a_year() -> None:
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(365 * 24 * 3600.0):
                await asyncio.Event().wait()
        assert asyncio.get_running_loop().time() - began == pytest.approx(365 * 24 * 3600.0)

    drive(wait_for_a_year())
    with pytest.raises(DeadlockError):
        drive(wait_for_ever())
