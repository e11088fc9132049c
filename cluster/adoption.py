"""What a new driver takes over from one that was lost: which roles, and how each becomes usable again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from cluster.control import SCALABLE
from cluster.fingerprint import fingerprint
from cluster.placement import Placer
from rlhf.errors import RlhfError

if TYPE_CHECKING:
    from cluster.config import RunConfig, Stage
    from cluster.lease import Lease
    from cluster.topology import Resources

GANGS = ("learner", "critic")

Welcome = Callable[[Any], Awaitable[None]]


def adoptable(config: RunConfig, stage: Stage, needed: Collection[str]) -> set[str]:
    """The roles of which a stage can use what an earlier driver left; the others are started anew, which takes little.

    Under a shared gate everything is: what an earlier driver had put aside for another role is known to nobody.
    """
    if config.gate == "shared":
        return set()
    gangs = GANGS if stage.kind == "rl" else ()  # ranks of other stages are Ray Train's
    return set(needed) & {"recorder", *SCALABLE, *gangs}


class Adoption:
    """Places roles for one driver, with what the lease lets it take over.

    Args:
        lease: The run's; None on a private cluster, where nothing outlives a driver.
        event: Writes one line of the event log.
    """

    def __init__(self, lease: Lease | None, event: Callable[..., None]) -> None:
        self._lease = lease
        self._event = event

    async def end_unclaimed(self, keep: Collection[str]) -> None:
        """Ends what an earlier driver left of roles that a stage has no use for."""
        if self._lease is not None and self._lease.num_inherited:
            ended = await asyncio.to_thread(self._lease.end_unclaimed, keep)
            if ended:
                self._event("orphans_ended", roles=ended)

    async def placer(
        self,
        role: str,
        resources: Resources,
        count: int,
        *,
        worker: type,
        kwargs: Mapping[str, Any],
        replaced: Collection[str] = (),
        gang: bool = False,
        fresh: bool = False,
        **options: Any,
    ) -> Placer:
        """A placer with what is taken over, and room for the rest.

        Args:
            role: Whose actors.
            resources: Of one.
            count: How many are wanted.
            worker: Their class.
            kwargs: Its arguments.
            replaced: Arguments that a kept actor need not have, see ``fingerprint``.
            gang: Whether all of them are kept or none.
            fresh: Whether none is kept.
            **options: Of the ``Placer``: ``max_concurrency``, ``restarts``.

        Raises:
            PlacementError: There was no room in time.
        """
        if self._lease is None:
            return await Placer.reserved(role, resources, count, **options)
        mark = await asyncio.to_thread(fingerprint, worker, kwargs, resources, replaced=replaced)
        kept = await asyncio.to_thread(self._lease.claim, role, "" if fresh else mark, count, whole=gang)
        options |= {"lease": self._lease, "kept": kept, "fingerprint": mark}
        return await Placer.reserved(role, resources, count, **options)

    async def admit(self, role: str, placer: Placer, welcome: Welcome | None = None) -> None:
        """Brings kept actors to what they have to serve; one that cannot take it is ended and started anew later.

        Until then nobody has their handles: nothing is asked of an actor with weights of who knows when.
        """
        for handle in placer.kept:
            began = time.monotonic()
            try:
                if welcome is not None:
                    await welcome(handle)
            except RlhfError as error:
                await asyncio.to_thread(placer.refuse, handle)
                self._event("replica_refused", role=role, error=str(error))
            else:
                self._event("replica_adopted", role=role, seconds=round(time.monotonic() - began, 3))
