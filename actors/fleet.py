"""A fleet: the replicas of one stateless role, which join with the current weights and leave after their work.

Replacing a dead replica, scaling a role and losing a node are the same two moves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from actors.calls import await_ref, kill, stream
from rlhf.errors import DeadlineError, PublicationError, ReplicaLostError, RlhfError

Event = Callable[..., None]


class ReplicaState(StrEnum):
    """Where a replica stands. Only a healthy one is given work."""

    STARTING = "starting"
    HEALTHY = "healthy"
    LEAVING = "leaving"
    DEAD = "dead"


@dataclass(eq=False)
class Replica:
    """One actor of a fleet."""

    index: int
    handle: Any
    state: ReplicaState = ReplicaState.STARTING
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: int = 0


@dataclass(frozen=True)
class FleetLimits:
    """Deadlines of a fleet in seconds, and how often a dead replica is replaced before the role is given up."""

    start_timeout_s: float = 600.0
    call_timeout_s: float = 1800.0
    max_restarts: int = 3


class Fleet:
    """Replicas of one role.

    Args:
        role: Name in logs and errors.
        spawn: Places and creates the actor of one index; it does not wait for its start.
        retire: Gives the placement of an ended actor back.
        event: Writes one line of the event log: ``event(kind, role=..., replica=..., ...)``.
        limits: Deadlines and restarts.
    """

    def __init__(
        self,
        role: str,
        spawn: Callable[[int], Any],
        retire: Callable[[Any], None],
        event: Event,
        limits: FleetLimits | None = None,
    ) -> None:
        self.role = role
        self.limits = limits or FleetLimits()
        self._spawn = spawn
        self._retire = retire
        self._event = event
        self._replicas: list[Replica] = []
        self._next_index = 0
        self._restarts = 0
        self._membership = asyncio.Lock()
        self.welcome: Callable[[Any], Awaitable[None]] | None = None
        """Brings a newcomer to the current weights before it serves; set by whoever publishes."""

    @property
    def healthy(self) -> list[Replica]:
        """Replicas that take work, in index order."""
        return [replica for replica in self._replicas if replica.state is ReplicaState.HEALTHY]

    async def scale(self, num_replicas: int) -> None:
        """Joins or leaves until ``num_replicas`` serve. Leavers finish their work first; youngest leave first."""
        async with self._membership:
            while len(self.healthy) > num_replicas:
                await self._leave(self.healthy[-1])
            missing = num_replicas - len(self.healthy)
            if missing > 0:
                await asyncio.gather(*(self._join() for _ in range(missing)))
                self._replicas.sort(key=lambda replica: replica.index)

    async def _join(self) -> Replica:
        replica = Replica(self._next_index, None)
        self._next_index += 1
        where = f"{self.role}[{replica.index}]"
        began = asyncio.get_running_loop().time()
        replica.handle = self._spawn(replica.index)
        self._replicas.append(replica)
        try:
            await await_ref(
                replica.handle.start.remote(), timeout_s=self.limits.start_timeout_s, where=f"{where}.start"
            )
            if self.welcome is not None:
                await self.welcome(replica.handle)
        except RlhfError:
            self._bury(replica)
            raise
        replica.state = ReplicaState.HEALTHY
        seconds = asyncio.get_running_loop().time() - began
        self._event("replica_joined", role=self.role, replica=replica.index, seconds=round(seconds, 3))
        return replica

    async def _leave(self, replica: Replica) -> None:
        replica.state = ReplicaState.LEAVING
        if replica.in_flight:
            replica.idle.clear()
            await asyncio.wait_for(replica.idle.wait(), self.limits.call_timeout_s)
        await self._stop(replica)
        self._event("replica_left", role=self.role, replica=replica.index)

    async def _stop(self, replica: Replica) -> None:
        with contextlib.suppress(ReplicaLostError, DeadlineError):
            await await_ref(replica.handle.stop.remote(), timeout_s=60.0, where=f"{self.role}[{replica.index}].stop")
        self._bury(replica)

    def _bury(self, replica: Replica) -> None:
        replica.state = ReplicaState.DEAD
        if replica in self._replicas:
            self._replicas.remove(replica)
        if replica.handle is not None:
            kill(replica.handle)
            self._retire(replica.handle)

    async def stop(self) -> None:
        """Ends every replica and gives its placement back."""
        await asyncio.gather(*(self._stop(replica) for replica in list(self._replicas)))

    async def replace(self, replica: Replica, error: RlhfError) -> None:
        """Ends a failed replica and starts another in its place; raises ``error`` when restarts are used up."""
        if replica.state is ReplicaState.DEAD:
            return  # another call of the same replica was here first
        self._bury(replica)
        self._event("replica_lost", role=self.role, replica=replica.index, error=str(error))
        self._restarts += 1
        if self._restarts > self.limits.max_restarts:
            raise error
        async with self._membership:
            await self._join()

    async def call(self, replica: Replica, method: str, *args: Any) -> Any:
        """One call of one replica, bounded in time."""
        replica.in_flight += 1
        try:
            ref = getattr(replica.handle, method).remote(*args)
            where = f"{self.role}[{replica.index}].{method}"
            return await await_ref(ref, timeout_s=self.limits.call_timeout_s, where=where)
        finally:
            self._finished(replica)

    def _finished(self, replica: Replica) -> None:
        replica.in_flight -= 1
        if not replica.in_flight:
            replica.idle.set()

    async def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Calls every healthy replica; one that fails is dropped from the fleet and replaced by the next ``repair``.

        Raises:
            PublicationError: No replica is left.
        """
        replicas = self.healthy
        results = await asyncio.gather(*(self.call(r, method, *args) for r in replicas), return_exceptions=True)
        kept = []
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, RlhfError):
                self._bury(replica)
                self._event("replica_lost", role=self.role, replica=replica.index, error=str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                kept.append(result)
        if not kept:
            failures = "; ".join(str(result) for result in results) or "no healthy replica"
            raise PublicationError(
                f"{self.role}.{method}", found=failures, needed="at least one healthy replica", action="See the log."
            )
        return kept

    async def scatter(self, method: str, items: Sequence[Any], *args: Any) -> list[Any]:
        """Maps a list-to-list method over items: contiguous shares to replicas in index order, results in item order.

        A replica that fails loses its share only. The share is dispatched once more, to its replacement; a second
        failure is raised.
        """

        async def run(replica: Replica, share: Sequence[Any]) -> list[Any]:
            try:
                return list(await self.call(replica, method, share, *args))
            except (ReplicaLostError, DeadlineError) as error:
                await self.replace(replica, error)
                return list(await self.call(self.healthy[-1], method, share, *args))

        shares = self._shares(items)
        results = await asyncio.gather(*(run(replica, share) for replica, share in shares))
        return [value for part in results for value in part]

    async def scatter_stream(self, method: str, items: Sequence[Any], *args: Any) -> list[Any]:
        """Like ``scatter`` for a streaming method; items and results carry ``uid``.

        What a replica delivered before it failed is kept; only the rest of its share is dispatched again.
        """

        async def run(replica: Replica, share: Sequence[Any]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            try:
                await self._drain(replica, method, (share, *args), found)
            except (ReplicaLostError, DeadlineError) as error:
                await self.replace(replica, error)
                rest = [item for item in share if item.uid not in found]
                self._event("redispatched", role=self.role, replica=replica.index, num_prompts=len(rest))
                if rest:
                    await self._drain(self.healthy[-1], method, (rest, *args), found)
            return found

        results = await asyncio.gather(*(run(replica, share) for replica, share in self._shares(items)))
        merged = {uid: value for part in results for uid, value in part.items()}
        return [merged[item.uid] for item in items]

    async def _drain(self, replica: Replica, method: str, args: tuple[Any, ...], found: dict[str, Any]) -> None:
        replica.in_flight += 1
        try:
            refs = getattr(replica.handle, method).options(num_returns="streaming").remote(*args)
            where = f"{self.role}[{replica.index}].{method}"
            async for value in stream(refs, timeout_s=self.limits.call_timeout_s, where=where):
                found[value.uid] = value
        finally:
            self._finished(replica)

    def _shares(self, items: Sequence[Any]) -> list[tuple[Replica, Sequence[Any]]]:
        replicas = self.healthy
        if not replicas:
            raise ReplicaLostError(
                self.role, found="no healthy replica", needed="at least one", action="See events.jsonl for the cause."
            )
        bounds = [round(i * len(items) / len(replicas)) for i in range(len(replicas) + 1)]
        shares = [(r, items[a:b]) for r, a, b in zip(replicas, bounds[:-1], bounds[1:], strict=True)]
        return [(replica, share) for replica, share in shares if share]
