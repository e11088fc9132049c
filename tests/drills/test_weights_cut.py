"""A weight update is cut half-way: the replica that takes it dies between two buckets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.gang import LearnerGang
from actors.publisher import BucketPublisher
from rlhf.weights import combine_digests
from tests.actors.exporting_ranks import DIGESTS, NUM_BUCKETS, ExportingRank
from tests.actors.fleets import EchoFleet, Fault, items, workers_of

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]


@dataclass
class TimedFleet(EchoFleet):
    """Also notes when each kind of event came last."""

    times: dict[str, float] = field(default_factory=dict)

    def _event(self, kind: str, **fields: Any) -> None:
        super()._event(kind, **fields)
        self.times[kind] = time.monotonic()


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replica_that_dies_between_buckets_never_serves(replicas: int, tell: Callable[..., None]) -> None:
    """SIGKILL of a replica that has taken two of four buckets of version 4.

    Passes if the publication ends well, a newcomer in its place holds all of version 4 and its digest before it is
    given work, work that is asked for then goes to replicas of version 4 only, and the dead one answered nothing.
    """
    import ray

    async def body() -> TimedFleet:
        async with TimedFleet({0: Fault("receive_bucket", "kill", after=2)}) as echo:
            await echo.fleet.scale(replicas)
            gang = LearnerGang("learner", [ray.remote(ExportingRank).options(num_cpus=0.1).remote(0)], timeout_s=60.0)
            publisher = BucketPublisher(gang, echo.fleet, echo._event, version=3, bucket_bytes=1000, timeout_s=60.0)
            began = time.monotonic()
            await publisher.publish(4)
            echo.times["began"] = began
            answers = await echo.fleet.scatter("answer", items(4))
            assert 0 not in workers_of(answers), "the one that died"
            await echo.fleet.replaced()
            seen = await echo.fleet.broadcast("seen")
            assert [replica["version"] for replica in seen] == [4] * replicas
            assert all(replica["buckets"] == list(range(NUM_BUCKETS)) for replica in seen)
            assert {replica["digest"] for replica in seen} == {combine_digests(DIGESTS)}
            assert echo.kinds().count("replica_lost") == 1
            gang.kill()
            return echo

    async def bounded() -> TimedFleet:
        async with asyncio.timeout(240):
            return await body()

    times = asyncio.run(bounded()).times
    tell(
        f"the {'only replica' if replicas == 1 else 'first of two replicas'} dies between buckets",
        detect_s=times["replica_lost"] - times["began"],
        recover_s=times["replica_joined"] - times["replica_lost"],
        lost_steps=0,
    )
