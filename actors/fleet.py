"""A fleet: the replicas of one stateless role, which join with the current weights and leave after their work.

Replacing a dead replica, scaling a role and losing a node are the same two moves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from actors.calls import await_ref, gather_all, kill, stream
from actors.restarts import RestartBudget
from rlhf.errors import (
    DeadlineError,
    EngineError,
    JudgeError,
    PublicationError,
    ReplicaLostError,
    RlhfError,
    ScorerError,
    WorkerError,
)

Event = Callable[..., None]

REPLACEABLE = (ReplicaLostError, DeadlineError, EngineError, JudgeError, ScorerError)
"""Failures that another replica may not have. Any other error lies in what was asked, or in the worker's own code, and
is raised at once."""


class ReplicaState(StrEnum):
    """Where a replica stands. Only a healthy one is given work."""

    STARTING = "starting"
    HEALTHY = "healthy"
    LEAVING = "leaving"
    DEAD = "dead"


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(eq=False)
class Replica:
    """One actor of a fleet; ``idle`` is set while no call of it is in flight."""

    index: int
    handle: Any = None
    state: ReplicaState = ReplicaState.STARTING
    idle: asyncio.Event = field(default_factory=_set_event)
    in_flight: int = 0


@dataclass(frozen=True)
class FleetLimits:
    """Deadlines of a fleet in seconds, and how many dead replicas are replaced within a time before it is given up."""

    start_timeout_s: float = 600.0
    call_timeout_s: float = 1800.0
    max_restarts: int = 3
    restart_window_s: float = 3600.0


class Fleet:
    """Replicas of one role.

    Joining and leaving happen under one lock, towards the number that ``scale`` asked for last; calls go on meanwhile.
    The wait for that lock, and for the one of the weights, ends with what the holder does: a leave within its
    ``call_timeout_s``, a join within the placement's and its own ``start_timeout_s`` and a welcome whose calls have
    limits, at most ``max_restarts`` of them one after the other.

    Args:
        role: Name in logs and errors.
        spawn: Places and creates the actor of one index; it does not wait for its start. Called in a thread, as the
            placement may have to wait for room.
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
        self._wanted = 0
        self._next_index = 0
        self._restarts = RestartBudget(self.limits.max_restarts, self.limits.restart_window_s)
        self._last_loss: RlhfError | None = None
        self._membership = asyncio.Lock()
        self.welcome: Callable[[Any], Awaitable[None]] | None = None
        """Brings a newcomer to the current weights before it serves; set by whoever publishes."""
        self._weights = asyncio.Lock()

    @property
    def healthy(self) -> list[Replica]:
        """Replicas that take work, in index order."""
        return [replica for replica in self._replicas if replica.state is ReplicaState.HEALTHY]

    @property
    def num_missing(self) -> int:
        """Replicas that were lost and that nobody replaces yet; one that is starting is none of them."""
        starting = sum(replica.state is ReplicaState.STARTING for replica in self._replicas)
        return max(0, self._wanted - starting - len(self.healthy))

    # Membership

    async def scale(self, num_replicas: int) -> None:
        """Joins or leaves until ``num_replicas`` serve. Leavers finish their work first; youngest leave first."""
        async with self._membership:
            before, self._wanted = self._wanted, num_replicas
            await gather_all(self._leave(replica) for replica in self.healthy[num_replicas:])
            newcomers = [self._newcomer() for _ in range(self.num_missing)]  # nobody else takes them for lost
            try:
                await gather_all(self._join(replica) for replica in newcomers)
            except RlhfError:
                if self._wanted:  # it was not stopped meanwhile
                    self._wanted = max(before, len(self.healthy))  # what could not join is not asked for again
                raise
            finally:
                for replica in newcomers:
                    if replica.state is ReplicaState.STARTING:  # it was given up before it began
                        self._bury(replica)

    async def repair(self) -> None:
        """Replaces what a broadcast dropped; raises the last loss when the restarts of this time are used up."""
        async with self._membership:
            if self._last_loss is not None:
                loss = self._last_loss
                await gather_all(self._restart(loss) for _ in range(self.num_missing))

    async def replace(self, replica: Replica, error: RlhfError) -> Replica:
        """Ends a failed replica and returns the one that takes its work over: a newcomer where one is missing.

        Raises:
            RlhfError: ``error`` when the restarts of this time are used up, or what kept the newcomer from starting.
        """
        self._drop(replica, error)
        async with self._membership:
            if self.num_missing:
                return await self._restart(error)
        if not self.healthy:
            raise error  # the fleet was stopped
        return min(self.healthy, key=lambda other: (other.in_flight, other.index))

    async def stop(self) -> None:
        """Ends every replica and gives its placement back."""
        self._wanted = 0
        await gather_all(self._stop(replica) for replica in list(self._replicas))

    async def _restart(self, error: RlhfError) -> Replica:
        while self._wanted and self._restarts.take():  # a stopped fleet wants nobody
            try:
                return await self._join(self._newcomer())
            except WorkerError:  # the next one would have the same code
                raise
            except RlhfError as failure:
                self._event("restart_failed", role=self.role, error=str(failure))
                error = failure
        if self._wanted:
            limits = self.limits
            used = {"max_restarts": limits.max_restarts, "restart_window_s": limits.restart_window_s}
            self._event("restarts_used_up", role=self.role, **used, error=str(error))
        raise error

    def _newcomer(self) -> Replica:
        replica = Replica(self._next_index)
        self._next_index += 1
        self._replicas.append(replica)
        return replica

    async def _join(self, replica: Replica) -> Replica:
        where = f"{self.role}[{replica.index}].start"
        began = asyncio.get_running_loop().time()
        placed = asyncio.ensure_future(asyncio.to_thread(self._spawn, replica.index))
        try:
            replica.handle = await asyncio.shield(placed)
            await await_ref(replica.handle.start.remote(), timeout_s=self.limits.start_timeout_s, where=where)
            async with self._weights:  # healthy before other weights come, or welcomed to those
                if self.welcome is not None:
                    await self.welcome(replica.handle)
                if replica.state is ReplicaState.STARTING:  # unless the fleet was stopped meanwhile
                    replica.state = ReplicaState.HEALTHY
        finally:
            if replica.state is not ReplicaState.HEALTHY:
                placed.add_done_callback(lambda _: self._bury_late(replica, placed))
                self._bury(replica)
        if replica.state is not ReplicaState.HEALTHY:
            raise ReplicaLostError(
                where, found="a fleet that was stopped meanwhile", needed="a fleet", action="Nothing: it is ended."
            )
        self._replicas.sort(key=lambda other: other.index)
        seconds = asyncio.get_running_loop().time() - began
        self._event("replica_joined", role=self.role, replica=replica.index, seconds=round(seconds, 3))
        return replica

    def _bury_late(self, replica: Replica, placed: asyncio.Future[Any]) -> None:
        """Ends an actor whose join was given up while it was being placed."""
        if replica.handle is None and not placed.cancelled() and placed.exception() is None:
            replica.handle = placed.result()
            self._bury(replica)

    async def _leave(self, replica: Replica) -> None:
        replica.state = ReplicaState.LEAVING
        with contextlib.suppress(TimeoutError):  # work that outlasts its own deadline is not waited for
            async with asyncio.timeout(self.limits.call_timeout_s):
                while replica.in_flight:  # a broadcast may have come between the last work and here
                    await replica.idle.wait()
        if replica.state is ReplicaState.LEAVING:  # it may have died at its last work
            await self._stop(replica)
            self._event("replica_left", role=self.role, replica=replica.index)

    async def _stop(self, replica: Replica) -> None:
        where = f"{self.role}[{replica.index}].stop"
        replica.state = ReplicaState.DEAD  # to callers, from here on
        try:
            if replica.handle is not None:
                with contextlib.suppress(RlhfError):  # it is ended either way
                    await await_ref(replica.handle.stop.remote(), timeout_s=60.0, where=where)
        finally:
            self._bury(replica)

    def _drop(self, replica: Replica, error: RlhfError) -> None:
        if replica.state is not ReplicaState.DEAD:  # another call of the same replica may have been here first
            self._bury(replica)
            self._last_loss = error
            self._event("replica_lost", role=self.role, replica=replica.index, error=str(error))

    def _bury(self, replica: Replica) -> None:
        replica.state = ReplicaState.DEAD
        if replica in self._replicas:
            self._replicas.remove(replica)
        if replica.handle is not None:
            kill(replica.handle)
            self._retire(replica.handle)

    # Calls

    async def call(self, replica: Replica, method: str, *args: Any) -> Any:
        """One call of one replica, bounded in time."""
        return await self._submit(replica, method, *args)

    def _submit(self, replica: Replica, method: str, *args: Any) -> asyncio.Future[Any]:
        """Sends one call at once, so that no leave can come between the choice of a replica and its work."""
        ref = getattr(replica.handle, method).remote(*args)
        where = f"{self.role}[{replica.index}].{method}"
        return self._track(replica, await_ref(ref, timeout_s=self.limits.call_timeout_s, where=where))

    def _track(self, replica: Replica, work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        replica.in_flight += 1
        replica.idle.clear()

        def finished(_: object) -> None:
            replica.in_flight -= 1
            if not replica.in_flight:
                replica.idle.set()

        task = asyncio.ensure_future(work)
        task.add_done_callback(finished)
        return task

    async def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Calls every replica that works; one that fails leaves the fleet and is replaced by the next ``repair``.

        A leaver still takes part: its last work may wait for the other half of what is broadcast.

        Raises:
            PublicationError: No replica is left.
            RlhfError: What was asked cannot be done by any replica; none is dropped for it.
        """
        working = (ReplicaState.HEALTHY, ReplicaState.LEAVING)
        replicas = [replica for replica in self._replicas if replica.state in working]
        calls = [self._submit(replica, method, *args) for replica in replicas]
        results = await asyncio.gather(*calls, return_exceptions=True)
        kept, impossible = [], None
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, (*REPLACEABLE, PublicationError)):
                self._drop(replica, result)
            elif isinstance(result, BaseException):
                impossible = impossible or result
            else:
                kept.append(result)
        if impossible is not None:
            raise impossible
        if not self.healthy:
            failures = "; ".join(str(r) for r in results if isinstance(r, RlhfError)) or "no healthy replica"
            raise PublicationError(
                f"{self.role}.{method}", found=failures, needed="at least one healthy replica", action="See the log."
            )
        return kept

    async def change_weights(self, welcome: Callable[[Any], Awaitable[None]], method: str, *args: Any) -> None:
        """Broadcasts a call that loads other weights, and welcomes newcomers to them from then on.

        No replica slips through: one that joins meanwhile is either among those that are called or waits, and then gets
        the new welcome.

        Raises:
            PublicationError: No replica is left.
        """
        async with self._weights:
            await self.broadcast(method, *args)
            self.welcome = welcome

    async def scatter(self, method: str, items: Sequence[Any], *args: Any) -> list[Any]:
        """Maps a list-to-list method over items: contiguous shares to replicas in index order, results in item order.

        A replica that fails loses its share only. The share is dispatched once more, to its replacement; a second
        failure is raised.
        """

        async def settle(replica: Replica, share: Sequence[Any], first: asyncio.Future[Any]) -> list[Any]:
            try:
                return list(await first)
            except REPLACEABLE as error:
                successor = await self.replace(replica, error)
                self._event("redispatched", role=self.role, replica=replica.index, num_items=len(share))
                return list(await self.call(successor, method, share, *args))

        sent = [(r, share, self._submit(r, method, share, *args)) for r, share in self._shares(items)]
        parts = await self._settle([settle(*one) for one in sent], [first for _, _, first in sent])
        return [value for part in parts for value in part]

    async def scatter_stream(self, method: str, items: Sequence[Any], *args: Any) -> list[Any]:
        """Like ``scatter`` for a streaming method; items and results carry ``uid``.

        What a replica delivered before it failed is kept; only the rest of its share is dispatched again.
        """
        found: dict[str, Any] = {}

        async def settle(replica: Replica, share: Sequence[Any], first: asyncio.Future[Any]) -> None:
            try:
                await first
            except REPLACEABLE as error:
                successor = await self.replace(replica, error)
                rest = [item for item in share if item.uid not in found]
                self._event("redispatched", role=self.role, replica=replica.index, num_items=len(rest))
                if rest:
                    await self._drain(successor, method, rest, args, found)

        shares = self._shares(items)
        sent = [(r, share, self._drain(r, method, share, args, found)) for r, share in shares]
        await self._settle([settle(*one) for one in sent], [first for _, _, first in sent])
        return [found[item.uid] for item in items]

    async def _settle(self, work: Sequence[Coroutine[Any, Any, Any]], sent: Sequence[asyncio.Future[Any]]) -> list[Any]:
        try:
            return await gather_all(work)
        finally:
            for first in sent:
                first.cancel()
            await asyncio.gather(*sent, return_exceptions=True)

    def _drain(
        self, replica: Replica, method: str, share: Sequence[Any], args: tuple[Any, ...], found: dict[str, Any]
    ) -> asyncio.Future[Any]:
        """Sends one streaming call at once; what it delivers goes into ``found`` as it comes."""
        refs = getattr(replica.handle, method).options(num_returns="streaming").remote(share, *args)
        where = f"{self.role}[{replica.index}].{method}"

        async def receive() -> None:
            async for value in stream(refs, timeout_s=self.limits.call_timeout_s, where=where):
                found[value.uid] = value
            lacking = [item.uid for item in share if item.uid not in found]
            if lacking:
                raise ReplicaLostError(
                    where,
                    found=f"a stream that ended without {lacking[0]!r} and {len(lacking) - 1} more",
                    needed=f"all {len(share)} results",
                    action="See the worker's log for the cause.",
                )

        return self._track(replica, receive())

    def _shares(self, items: Sequence[Any]) -> list[tuple[Replica, Sequence[Any]]]:
        replicas = self.healthy
        if not replicas:
            raise ReplicaLostError(
                self.role, found="no healthy replica", needed="at least one", action="See events.jsonl for the cause."
            )
        bounds = [round(i * len(items) / len(replicas)) for i in range(len(replicas) + 1)]
        shares = [(r, items[a:b]) for r, a, b in zip(replicas, bounds[:-1], bounds[1:], strict=True)]
        return [(replica, share) for replica, share in shares if share]
