"""Publication: the learner's weights, in buckets through the object store, to every generation replica.

No process holds a whole gathered copy beyond one bucket and the receiving model: rank 0 puts one bucket at a time, the
replicas read it from shared memory, and it is dropped before the next.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from actors.calls import await_ref
from actors.fleet import Event, Fleet
from actors.fleet_status import note_version
from actors.gang import LearnerGang
from rlhf.errors import PublicationError, ValueLostError
from rlhf.weights import combine_digests


class BucketPublisher:
    """The ``WeightPublisher`` seam between a learner gang and the generation fleet.

    Args:
        gang: Whose weights are published.
        fleet: Who takes them. The publisher makes itself the fleet's welcome, so that newcomers start current.
        version: Version of the gang's weights now.
        bucket_bytes: Largest bucket; a larger single tensor goes alone.
        timeout_s: Longest wait for one step (begin, a bucket, finish) on one replica. A good deal less than an engine
            gives a whole update: the others must not give theirs up while they wait for one that hangs.
        event: Event log.
    """

    def __init__(
        self, gang: LearnerGang, fleet: Fleet, event: Event, *, version: int, bucket_bytes: int, timeout_s: float
    ) -> None:
        self._gang = gang
        self.fleet = fleet
        self._event = event
        self._version = version
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        fleet.welcome = self.welcome
        note_version(fleet, version)

    async def publish(self, version: int) -> Mapping[str, float]:
        """Returns when every healthy replica serves ``version``, and there is one.

        One that failed to take it is replaced beside whatever comes next, and its replacement starts with the version
        that is the newest then.

        A learner that is lost with a bucket of its own costs no replica. They serve nothing until a publication has
        reached them whole: the next one, of the learner's next life.

        Raises:
            LearnerError: The learner is lost.
            RlhfError: See ``Fleet.repair``.
        """
        metrics: Mapping[str, float] = {}
        missing = self.fleet.num_missing
        # The fleet first, as for a newcomer: one that is being welcomed to other weights would miss these.
        async with self.fleet.changing_weights(), self._gang.exporting():
            try:
                metrics = await self._send(version, partial(self.fleet.broadcast, timeout_s=self._timeout_s))
            except PublicationError:
                if self.fleet.healthy:
                    raise
            self._version = version
            note_version(self.fleet, version)
        if (num_lost := self.fleet.num_missing - missing) > 0:
            self._event("publication_repair", role=self.fleet.role, version=version, num_lost=num_lost)
        if self.fleet.num_missing:
            await self.fleet.repair()
        return metrics

    async def welcome(self, handle: Any) -> None:
        """Gives a newcomer the current weights before it serves."""

        async def newcomer(method: str, *args: Any) -> None:
            where = f"{self.fleet.role}.{method}"
            await await_ref(getattr(handle, method).remote(*args), timeout_s=self._timeout_s, where=where)

        async with self._gang.exporting():
            await self._send(self._version, newcomer)

    async def _send(self, version: int, deliver: Callable[..., Awaitable[object]]) -> Mapping[str, float]:
        began = time.monotonic()
        plans = await self._gang.call("export_plan", lambda rank: (self._bucket_bytes,))
        num_buckets = len(plans[0])
        await deliver("begin_update", version)
        digests: list[str] = []
        num_bytes = 0
        for index in range(num_buckets):
            sent: Sequence[Any] = await self._gang.call("put_bucket", lambda rank, index=index: (index,))  # type: ignore[misc]
            handle, digest, size = sent[0]
            try:
                await deliver("receive_bucket", [handle])  # in a list, as the replica fetches it
            except ValueLostError as error:
                raise self._gang.lose(error) from error
            digests.append(digest)
            num_bytes += size
        await deliver("finish_update", version, combine_digests(digests))
        return {"seconds": time.monotonic() - began, "bytes": float(num_bytes), "buckets": float(num_buckets)}
