"""Publication over real Ray: every replica gets every bucket in order, and a failing one costs only itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.fleet import FleetLimits
from actors.gang import LearnerGang
from actors.publisher import BucketPublisher
from actors.store import RayStore
from rlhf.errors import LearnerError, RlhfError, ValueLostError
from rlhf.weights import combine_digests
from tests.actors.exporting_ranks import DIGESTS, NUM_BUCKETS, ExportingRank
from tests.actors.fleets import EchoFleet, Fault, items, until, workers_of

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]


class Publication:
    """A gang, a fleet and the publisher between them."""

    def __init__(
        self, echo: EchoFleet, version: int = 3, fail_at: int | None = None, gang: type[LearnerGang] = LearnerGang
    ) -> None:
        import ray

        self.echo = echo
        remote = ray.remote(ExportingRank).options(num_cpus=0.1)
        self.gang = gang("learner", [remote.remote(rank, fail_at) for rank in range(2)], timeout_s=30.0)
        self.publisher = BucketPublisher(
            self.gang, echo.fleet, echo._event, version=version, bucket_bytes=1000, timeout_s=30.0
        )

    async def seen(self) -> list[tuple[int, list[int], list[str]]]:
        """Version, buckets and calls of every replica; each was told the digest over all buckets in their order."""
        found = await self.echo.fleet.broadcast("seen")
        for replica in found:
            assert replica["digest"] == (combine_digests(DIGESTS) if "finish_update" in replica["calls"] else "")
        return [(replica["version"], replica["buckets"], replica["calls"]) for replica in found]


class DoomedGang(LearnerGang):
    """A gang whose rank 0 dies between the put of its third bucket and its delivery."""

    async def call(self, method: str, *args: Any) -> list[Any]:
        import ray

        found = await super().call(method, *args)
        if method == "put_bucket" and found[0][1] == DIGESTS[2]:
            ray.kill(self.ranks[0])
            await until_lost(found[0][0])
        return found


async def until_lost(bucket: Any) -> None:
    """Ray drops what a dead process owned in its own time."""
    with pytest.raises(ValueLostError):
        while True:
            await asyncio.to_thread(RayStore(timeout_s=30.0).get, bucket)
            await asyncio.sleep(0.1)


def drive(body) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await body()

    asyncio.run(bounded())


WHOLE = list(range(NUM_BUCKETS))
UPDATE = ["begin_update", *["receive_bucket"] * NUM_BUCKETS, "finish_update"]


def test_every_replica_gets_all_buckets_in_order_and_serves_the_version() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(2)
            publication = Publication(echo)
            metrics = await publication.publisher.publish(4)
            assert (metrics["buckets"], metrics["bytes"]) == (NUM_BUCKETS, 100.0 * NUM_BUCKETS)
            assert await publication.seen() == [(4, WHOLE, ["start", *UPDATE])] * 2
            for log in await publication.gang.call("seen"):
                assert log == [["plan", 1000], *WHOLE] or log == [("plan", 1000), *WHOLE]
            publication.gang.kill()

    drive(body)


@pytest.mark.parametrize("method", ["begin_update", "receive_bucket", "finish_update"])
@pytest.mark.parametrize("kind", ["bucket", "kill"])
def test_a_replica_that_fails_to_take_the_weights_is_replaced_at_the_new_version(method: str, kind: str) -> None:
    async def body() -> None:
        fault = Fault(method, kind, after=2 if method == "receive_bucket" else 0)
        async with EchoFleet({0: fault}) as echo:
            await echo.fleet.scale(2)
            publication = Publication(echo)
            await publication.publisher.publish(4)
            assert echo.fleet.healthy[0].index == 1
            await echo.fleet.replaced()
            assert [replica.index for replica in echo.fleet.healthy] == [1, 2]
            assert await publication.seen() == [(4, WHOLE, ["start", *UPDATE])] * 2
            assert ("publication_repair", {"role": "echo", "version": 4, "num_lost": 1}) in echo.events
            publication.gang.kill()

    drive(body)


def test_the_only_replica_may_fail_as_long_as_restarts_are_left() -> None:
    async def body() -> None:
        fault = Fault("receive_bucket", "bucket")
        async with EchoFleet({0: fault}) as echo:
            await echo.fleet.scale(1)
            publication = Publication(echo)
            await publication.publisher.publish(4)
            assert await publication.seen() == [(4, WHOLE, ["start", *UPDATE])]
            publication.gang.kill()

        limits = FleetLimits(30.0, 20.0, max_restarts=1)
        async with EchoFleet({0: fault, 1: fault}, limits) as echo:
            await echo.fleet.scale(1)
            publication = Publication(echo)
            with pytest.raises(RlhfError, match="wrong digest"):
                await publication.publisher.publish(4)
            publication.gang.kill()

    drive(body)


def test_newcomers_and_replacements_start_at_the_published_version() -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", "kill")}) as echo:
            await echo.fleet.scale(1)
            publication = Publication(echo, version=3)
            await echo.fleet.scale(2)
            assert [version for version, _, _ in await publication.seen()] == [-1, 3]
            await publication.publisher.publish(4)
            assert workers_of(await echo.fleet.scatter("answer", items(2))) == [1, 1]
            await echo.fleet.replaced()
            assert [version for version, _, _ in await publication.seen()] == [4, 4]
            publication.gang.kill()

    drive(body)


def test_scaling_while_publishing_mixes_no_versions_and_strands_no_leaver() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(2)
            publication = Publication(echo)
            await publication.publisher.publish(3)  # everyone has started
            work = asyncio.create_task(echo.fleet.scatter("answer", items(4), 5.0))
            await asyncio.sleep(0.1)
            leaver = echo.fleet.healthy[1].handle
            shrinking = asyncio.create_task(echo.fleet.scale(1))
            await asyncio.sleep(0)
            await publication.publisher.publish(4)
            seen = await leaver.seen.remote()
            assert seen["calls"][-len(UPDATE) :] == UPDATE, "what it began to receive it received to the end"
            assert workers_of(await work) == [0, 0, 1, 1]
            await shrinking
            assert [replica.index for replica in echo.fleet.healthy] == [0], "a publication brings no leaver back"

            growing = asyncio.create_task(echo.fleet.scale(3))
            for version in (5, 6, 7):
                await publication.publisher.publish(version)
            await growing
            assert [version for version, _, _ in await publication.seen()] == [7, 7, 7]
            publication.gang.kill()

    drive(body)


def test_a_learner_that_fails_to_export_ends_the_publication_and_its_gang() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(1)
            publication = Publication(echo, fail_at=2)
            with pytest.raises(LearnerError, match="no memory"):
                await publication.publisher.publish(4)
            assert publication.gang.ranks == []
            assert not publication.gang.lock.locked()

    drive(body)


def test_a_bucket_that_goes_away_with_its_learner_costs_no_replica_and_the_next_learner_publishes_anew() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(2)
            first = Publication(echo, gang=DoomedGang)
            with pytest.raises(LearnerError, match="OwnerDiedError"):
                await first.publisher.publish(4)
            assert first.gang.ranks == [], "all ranks start again"
            assert [replica.index for replica in echo.fleet.healthy] == [0, 1]
            growing = asyncio.create_task(echo.fleet.scale(3))
            await until(lambda: echo.fleet.states.get("stale") == 1, 60.0)
            second = Publication(echo)
            await second.publisher.publish(4)
            await growing
            cut = ["begin_update", *["receive_bucket"] * 3]
            assert await second.seen() == [(4, WHOLE, ["start", *cut, *UPDATE])] * 2 + [(4, WHOLE, ["start", *UPDATE])]
            assert "replica_lost" not in echo.kinds() and echo.fleet._restarts.num_taken == 0
            second.gang.kill()

    drive(body)
