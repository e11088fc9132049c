"""A fleet: the replicas of one stateless role, which join with the current weights and leave after their work.

Replacing a dead replica, scaling a role and losing a node are the same two moves. Who the replicas are is said here;
how work is shared out over them, in ``actors.dispatch``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.calls import await_ref, gather_all, kill
from actors.dispatch import REPLACEABLE, Dispatch, Event
from actors.replicas import ENDED, JOINING, PRESENT, FleetLimits, Replica, ReplicaState, no_change
from actors.restarts import RestartBudget
from rlhf.errors import LearnerError, PublicationError, ReplicaLostError, RlhfError, WorkerError

__all__ = ["REPLACEABLE", "Event", "Fleet", "FleetLimits", "Replica", "ReplicaState"]

_PLACING_THREADS = 32
"""Replicas of a fleet that may wait for room on the cluster at the same time."""


class Fleet(Dispatch):
    """Replicas of one role.

    Calls go on while replicas join and leave. One ``scale`` comes after another; what is lost meanwhile is replaced
    without waiting for it, as a newcomer may have to wait for room on the cluster. Replacements come one after another
    too. These waits, and the one for the weights, end with what the holder does: a leave within its ``call_timeout_s``,
    a join within the placement's and its own ``start_timeout_s`` and a welcome whose calls have limits, at most
    ``max_restarts`` of them one after the other.

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
        self._lost: list[Replica] = []
        """Those that were lost and have no replacement that serves."""
        self._wanted = 0
        self._next_index = 0
        self._restarts = RestartBudget(self.limits.max_restarts, self.limits.restart_window_s)
        self._last_loss: RlhfError | None = None
        self._scaling = asyncio.Lock()
        self._membership = asyncio.Lock()
        self._changed = asyncio.Event()
        self._leaving: asyncio.Future[Any] | None = None
        # The event loop's own threads are few, and newcomers that wait for room would keep them from everybody else.
        self._placing = ThreadPoolExecutor(_PLACING_THREADS, thread_name_prefix=f"place-{role}")
        self.welcome: Callable[[Any], Awaitable[None]] | None = None
        """Brings a newcomer to the current weights before it serves; set by whoever publishes."""
        self._weights = asyncio.Lock()

    @property
    def healthy(self) -> list[Replica]:
        """Replicas that take work, in index order."""
        return [replica for replica in self._replicas if replica.state is ReplicaState.HEALTHY]

    @property
    def wanted(self) -> int:
        """Replicas that ``scale`` asked for last."""
        return self._wanted

    @property
    def present(self) -> list[Replica]:
        """Replicas that are not dead, leavers included, in index order: those that can be asked something."""
        return list(self._replicas)

    @property
    def num_missing(self) -> int:
        """Replicas that were lost and that nobody replaces yet; one that is starting or suspect is none of them."""
        return max(0, self._wanted - sum(replica.state in PRESENT for replica in self._replicas))

    @property
    def states(self) -> Mapping[str, int]:
        """Number of replicas by the name of their state, of those that are there or wait for a replacement."""
        return Counter(replica.state.value for replica in [*self._replicas, *self._lost])

    # Membership

    async def scale(self, num_replicas: int) -> None:
        """Joins or leaves until ``num_replicas`` serve. Leavers finish their work first; youngest leave first."""
        async with self._scaling:
            async with self._membership:  # what is being replaced counts
                before, self._wanted = self._wanted, num_replicas
                suspects = [replica for replica in self._replicas if replica.state is ReplicaState.SUSPECT]
                leavers = [*self.healthy, *suspects][num_replicas:]
                for replica in leavers:
                    self._become(replica, ReplicaState.LEAVING)
                newcomers = [self._newcomer() for _ in range(self.num_missing)]  # nobody else takes them for lost
                self._lost.clear()
            leaving = self._leaving = asyncio.gather(*map(self._leave, leavers))
            await asyncio.shield(leaving)  # they leave to the end, whatever becomes of whoever asked
            try:
                await gather_all(self._join(replica) for replica in newcomers)
            except RlhfError:
                if self._wanted:  # it was not stopped meanwhile
                    self._wanted = max(before, len(self.healthy))  # what could not join is not asked for again
                raise
            finally:
                for replica in newcomers:
                    if replica.state in JOINING:  # it was given up before it began
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
        self._lost.clear()
        await gather_all(self._stop(replica) for replica in list(self._replicas))
        self._placing.shutdown(wait=False, cancel_futures=True)

    async def _restart(self, error: RlhfError) -> Replica:
        lost = next((replica for replica in self._lost if replica.state is ReplicaState.DEAD), None)
        while self._wanted and self._restarts.take():  # a stopped fleet wants nobody
            if lost is not None:
                self._become(lost, ReplicaState.RESTARTING)
            try:
                return await self._join(self._newcomer(), lost)
            except (WorkerError, LearnerError):  # the next one would have the same code, or ask the same dead gang
                raise
            except RlhfError as failure:
                self._event("restart_failed", role=self.role, error=str(failure))
                error = failure
            finally:
                if lost is not None:
                    self._become(lost, ReplicaState.DEAD)
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

    async def _join(self, replica: Replica, lost: Replica | None = None) -> Replica:
        """Starts and welcomes a newcomer; ``lost`` is whom it replaces."""
        where = f"{self.role}[{replica.index}].start"
        began = time.monotonic()
        placed = asyncio.get_running_loop().run_in_executor(self._placing, self._spawn, replica.index)
        try:
            replica.handle = await asyncio.shield(placed)
            await await_ref(replica.handle.start.remote(), timeout_s=self.limits.start_timeout_s, where=where)
            if replica.state is ReplicaState.STARTING:  # unless the fleet was stopped meanwhile
                self._become(replica, ReplicaState.STALE)
            await self._bring_up_to_date(replica)
        finally:
            if replica.state is not ReplicaState.HEALTHY:
                placed.add_done_callback(lambda _: self._bury_late(replica, placed))
                self._bury(replica)
        if replica.state is not ReplicaState.HEALTHY:
            raise ReplicaLostError(
                where, found="a fleet that was stopped meanwhile", needed="a fleet", action="Nothing: it is ended."
            )
        self._replicas.sort(key=lambda other: other.index)
        told: dict[str, Any] = {"seconds": round(time.monotonic() - began, 3)}
        if lost is not None:
            self._lost.remove(lost)
            told |= {"replaces": lost.index, "recover_s": round(lost.silent_s, 3)}
        self._event("replica_joined", role=self.role, replica=replica.index, **told)
        return replica

    async def _bring_up_to_date(self, replica: Replica) -> None:
        """Makes a stale replica healthy."""
        async with self._weights:  # healthy before other weights come, or welcomed to those
            if self.welcome is not None:
                await self.welcome(replica.handle)
            if replica.state is ReplicaState.STALE:  # unless it ended meanwhile
                replica.missed_broadcast = False
                replica.saw()
                self._become(replica, ReplicaState.HEALTHY)

    def _become(self, replica: Replica, state: ReplicaState) -> None:
        replica.become(state)
        self._changed.set()
        self._changed = asyncio.Event()

    def _bury_late(self, replica: Replica, placed: asyncio.Future[Any]) -> None:
        """Ends an actor whose join was given up while it was being placed."""
        if replica.handle is None and not placed.cancelled() and placed.exception() is None:
            replica.handle = placed.result()
            self._bury(replica)

    async def _leave(self, replica: Replica) -> None:
        with contextlib.suppress(TimeoutError):  # work that outlasts its own deadline is not waited for
            async with asyncio.timeout(self.limits.call_timeout_s):
                while replica.in_flight:  # a broadcast may have come between the last work and here
                    await replica.idle.wait()
        if replica.state is ReplicaState.LEAVING:  # it may have died at its last work
            await self._stop(replica)
            self._event("replica_left", role=self.role, replica=replica.index)

    async def _stop(self, replica: Replica) -> None:
        where = f"{self.role}[{replica.index}].stop"
        if replica.state not in ENDED:
            self._become(replica, ReplicaState.DEAD)  # to callers, from here on
        try:
            if replica.handle is not None:
                with contextlib.suppress(RlhfError):  # it is ended either way
                    await await_ref(replica.handle.stop.remote(), timeout_s=60.0, where=where)
        finally:
            self._bury(replica)

    def _drop(self, replica: Replica, error: RlhfError) -> None:
        if replica.state in ENDED:  # another call of the same replica may have been here first
            return
        self._bury(replica)
        self._last_loss = error
        if self.num_missing > sum(other.state is ReplicaState.DEAD for other in self._lost):
            self._lost.append(replica)
        cost = {"detect_s": round(replica.silent_s, 3), "lost_steps": 0, "lost_tokens": replica.unfinished_tokens}
        self._event("replica_lost", role=self.role, replica=replica.index, **cost, error=str(error))

    def _bury(self, replica: Replica) -> None:
        if replica.state not in ENDED:
            self._become(replica, ReplicaState.DEAD)
        if replica in self._replicas:
            self._replicas.remove(replica)
        if replica.handle is not None:
            kill(replica.handle)
            self._retire(replica.handle)

    # Health

    def suspect(self, replica: Replica, error: RlhfError) -> None:
        """Gives a replica no more work, as a probe of it is overdue; one that is leaving gets none anyway."""
        if replica.state is ReplicaState.HEALTHY:
            self._become(replica, ReplicaState.SUSPECT)
            self._event("replica_suspect", role=self.role, replica=replica.index, error=str(error))

    async def answered(self, replica: Replica, *, repair: bool = True) -> None:
        """Takes a suspect that has answered in again, after a welcome where others have been told something since.

        One that cannot be welcomed is lost; see ``lose`` for ``repair``.
        """
        replica.saw()
        if replica.state is not ReplicaState.SUSPECT:
            return
        if replica.missed_broadcast:
            self._become(replica, ReplicaState.STALE)
            try:
                await self._bring_up_to_date(replica)
            except RlhfError as error:
                await self.lose(replica, error, repair=repair)
                return
        else:
            self._become(replica, ReplicaState.HEALTHY)
        self._event("replica_recovered", role=self.role, replica=replica.index)

    async def lose(self, replica: Replica, error: RlhfError, *, repair: bool = True) -> None:
        """Ends a replica that does not work any more, and replaces it unless others do; what cannot be is an event."""
        self._drop(replica, error)
        if repair:
            with contextlib.suppress(RlhfError):  # it is in the events; whoever needs the replica raises it
                await self.repair()

    async def available(self) -> None:
        """Returns when a replica is healthy, or none can be expected to become so; replaces lost ones where none is.

        Raises:
            DeadlineError: Neither is so after a start and a call's time.
            RlhfError: What kept a replacement from starting.
        """
        while not self.healthy:
            if self.num_missing and self._last_loss is not None and self._restarts.left:
                await self.repair()
            elif self._may_serve_soon():
                await self._until(lambda: bool(self.healthy) or not self._may_serve_soon(), "a healthy replica")
            else:
                return

    async def settled(self) -> None:
        """Returns when no replica is suspect or on its way back from it.

        Raises:
            DeadlineError: Some still are after a start and a call's time.
        """

        def is_open(replica: Replica) -> bool:
            return replica.state is ReplicaState.SUSPECT or replica.missed_broadcast

        await self._until(lambda: not any(map(is_open, self._replicas)), "an answer of its suspects")

    def _may_serve_soon(self) -> bool:
        coming = (*JOINING, ReplicaState.SUSPECT, ReplicaState.RESTARTING)
        return any(replica.state in coming for replica in [*self._replicas, *self._lost])

    async def _until(self, condition: Callable[[], bool], needed: str) -> None:
        limit_s = self.limits.start_timeout_s + self.limits.call_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            raise no_change(self.role, self.states, limit_s, needed) from None

    # Weights

    async def change_weights(self, welcome: Callable[[Any], Awaitable[None]], method: str, *args: Any) -> None:
        """Broadcasts a call that loads other weights, and welcomes newcomers to them from then on.

        No replica slips through: one that joins meanwhile is either among those that are called or waits, and then gets
        the new welcome. Those that fail are replaced.

        Raises:
            RlhfError: Replicas were lost and the restarts of this time are used up.
        """
        async with self.changing_weights():
            try:
                await self.broadcast(method, *args)
            except PublicationError:
                if self.healthy or not self._wanted:
                    raise
            self.welcome = welcome
        await self.repair()

    @contextlib.asynccontextmanager
    async def changing_weights(self) -> AsyncIterator[None]:
        """A block in which nobody is welcomed: whoever is being welcomed already serves before it begins."""
        async with self._weights:
            yield
