"""A driver of echo replicas and learner ranks on a joined cluster whose nodes go away: ``python -m`` this ``ADDRESS``.

It prints ``{"lose": ROLE}`` when a node of a role has to go away without grace and another to come, waits for a line of
its input, and in the end prints what has become of everybody. Nodes are labelled ``for: ROLE``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from actors.gang import LearnerGang
from actors.publisher import BucketPublisher
from cluster.placement import Placer, connect, disconnect
from cluster.topology import Resources
from rlhf.errors import LearnerError
from tests.actors.exporting_ranks import DIGESTS, ExportingRank
from tests.actors.fleets import EchoFleet, FleetLimits, items, workers_of

LIMITS = FleetLimits(start_timeout_s=240.0, call_timeout_s=60.0, max_restarts=1)


def resources(role: str) -> Resources:
    """One actor on each node of a role."""
    return Resources(cpus=1.0, threads=1, start_timeout_s=240.0, labels={"for": role})


async def lose(role: str) -> None:
    """Has a node taken away."""
    print(json.dumps({"lose": role}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)


class CutGang(LearnerGang):
    """Its node goes away between the put of its third bucket and the delivery."""

    async def call(self, method: str, *args: Any) -> list[Any]:
        found = await super().call(method, *args)
        if method == "put_bucket" and found[0][1] == DIGESTS[2]:
            await lose("learner")
        return found


class Learner:
    """A gang of one rank, placed and published as a run does it."""

    def __init__(self, echo: EchoFleet, gang: type[LearnerGang] = LearnerGang) -> None:
        self.placer = Placer("learner", resources("learner"), 1)
        self.echo, self._kind = echo, gang
        self.gang: LearnerGang

    async def publish(self, version: int) -> None:
        """Places the rank and publishes its weights."""
        await asyncio.to_thread(self.placer.reserve)
        rank = await asyncio.to_thread(self.placer.spawn, ExportingRank, {"rank": 0})
        self.gang = self._kind("learner", [rank], timeout_s=60.0)
        publisher = BucketPublisher(
            self.gang, self.echo.fleet, self.echo._event, version=3, bucket_bytes=1000, timeout_s=100.0
        )
        await publisher.publish(version)

    def end(self) -> None:
        """Ends the rank and gives its place back."""
        self.gang.kill()
        self.placer.close()


async def main(address: str) -> None:
    """Loses a learner's node in a publication, the next one's behind its publication, and then a replica's."""
    connect(address, num_cpus=None, object_store_bytes=None)
    told: dict[str, Any] = {}
    async with EchoFleet(limits=LIMITS, size=2, resources=resources("echo")) as echo:
        await echo.fleet.scale(2)
        cut = Learner(echo, CutGang)
        try:
            await cut.publish(4)
        except LearnerError as error:
            told["cut"] = str(error)
        cut.end()
        told["kept"] = [replica.index for replica in echo.fleet.healthy]
        second = Learner(echo)
        await second.publish(4)
        told["second"] = [replica["version"] for replica in await echo.fleet.broadcast("seen")]

        await lose("learner")
        second.end()
        third = Learner(echo)
        await third.publish(5)  # at once: nothing of it goes to the node that is gone
        told["third"] = [replica["version"] for replica in await echo.fleet.broadcast("seen")]

        await lose("echo")
        async with asyncio.timeout(300):
            while "replica_lost" not in echo.kinds():  # its process may outlive its node by a moment
                told["answered"] = workers_of(await echo.fleet.scatter("answer", items(2), 0.2))
        await echo.fleet.replaced()
        told["fourth"] = [replica["version"] for replica in await echo.fleet.broadcast("seen")]
        told["events"] = echo.events
        told["num_taken"] = echo.fleet._restarts.num_taken
        third.end()
    print(json.dumps({"told": told}), flush=True)
    disconnect()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
