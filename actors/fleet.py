"""A fleet: the replicas of one stateless role, which join with the current weights and leave after their work.

Replacing a dead replica, scaling a role and losing a node are the same two moves, which are made here. Who the replicas
are and what they wait for stands in ``actors.members``; how one comes to serve, in ``actors.newcomers``; how work is
shared out over them, in ``actors.dispatch``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from actors.calls import await_ref, gather_all
from actors.dispatch import REPLACEABLE, Event
from actors.newcomers import Newcomers, Welcome
from actors.replicas import ENDED, JOINING, FleetLimits, Replica, ReplicaState
from rlhf.errors import PublicationError, ReplicaLostError, RlhfError, WorkerError

__all__ = ["REPLACEABLE", "Event", "Fleet", "FleetLimits", "Replica", "ReplicaState"]


class Fleet(Newcomers):
    """Replicas of one role.

    Calls go on while replicas join and leave. What is lost is replaced beside them: nobody waits for a newcomer while
    another replica is healthy. Once the restarts of this time are used up, the fleet goes on with those that are left,
    and replaces again when some of its restarts lie behind the window; the error comes when nobody is left. A defect of
    a newcomer's code, and the loss of the learner that welcomes it, are raised by the next call.

    One ``scale`` comes after another, and after the replacements that are under way; what is lost meanwhile is replaced
    without waiting for it, as a newcomer may have to wait for room on the cluster. These waits, and the one for the
    weights, end with what the holder does: a leave within its ``call_timeout_s``, a join within the placement's and its
    own ``start_timeout_s``, a welcome whose calls have limits and the wait for another learner, as often one after the
    other as there are restarts.

    Args:
        role: Name in logs and errors.
        spawn: Places and creates the actor of one index; it does not wait for its start. Called in a thread, as the
            placement may have to wait for room.
        retire: Gives the placement of an ended actor back.
        event: Writes one line of the event log: ``event(kind, role=..., replica=..., ...)``.
        limits: Deadlines and restarts.
        in_turn: Whether the fleet takes turns with other roles on one GPU. Then a replacement starts only within a call
            that waits for it, which is within the fleet's own phase, and ends with that call.
    """

    def __init__(
        self,
        role: str,
        spawn: Callable[[int], Any],
        retire: Callable[[Any], None],
        event: Event,
        limits: FleetLimits | None = None,
        *,
        in_turn: bool = False,
    ) -> None:
        super().__init__(role, spawn, retire, event, limits or FleetLimits())
        self._in_turn = in_turn
        self._restarts = self._replacements.budget
        self._scaling = asyncio.Lock()
        self._leaving: asyncio.Future[Any] | None = None

    # Membership

    async def scale(self, num_replicas: int) -> None:
        """Joins or leaves until ``num_replicas`` serve. Leavers finish their work first; youngest leave first.

        Raises:
            RlhfError: A newcomer could not join; one that is lost in its start is replaced while restarts are left.
        """
        async with self._scaling:
            await self._replacements.ended()  # what is being replaced counts
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
                async with self._replacing():
                    await gather_all(self._join_first(replica) for replica in newcomers)
            except RlhfError:
                await self._replacements.cancel()  # of those that could not join, too
                if self._wanted:  # it was not stopped meanwhile
                    self._wanted = max(before, len(self.healthy))  # what could not join is not asked for again
                    self._forget_surplus()
                raise
            finally:
                for replica in newcomers:
                    if replica.state in JOINING:  # it was given up before it began
                        self._bury(replica)

    async def repair(self) -> None:
        """Begins to replace what was lost, and returns when some replica is healthy.

        Raises:
            RlhfError: The last loss where nobody is left and the restarts of this time are used up, or the defect of a
                replacement.
        """
        self._replacements.check()
        if self.num_missing or self._replacements.under_way:
            await self.available()
            if self._wanted and not self.healthy and self._last_loss is not None:
                raise self._last_loss

    async def replace(self, replica: Replica, error: RlhfError) -> None:
        """Ends a failed replica, begins to replace it where it is missed, and returns when some replica is healthy.

        Raises:
            RlhfError: See ``repair``; ``error`` where the fleet was stopped.
        """
        self.lose(replica, error)
        await self._confirm()
        await self.repair()
        if not self.healthy:
            await self.available()  # of suspects
        if not self.healthy:
            raise error

    async def replaced(self) -> None:
        """Returns when no replacement is under way any more, whatever became of them."""
        await self._replacements.ended()

    async def stop(self) -> None:
        """Ends every replica and gives its placement back; replacements that are under way are given up."""
        self._wanted = 0
        self._lost.clear()
        await self._replacements.cancel()
        await gather_all(self._stop(replica) for replica in list(self._replicas))
        self._placing.shutdown(wait=False, cancel_futures=True)
        self._notice()

    @contextlib.asynccontextmanager
    async def _replacing(self) -> AsyncIterator[None]:
        """A block that waits for replacements, which begin with it; a fleet that takes turns ends them with it too."""
        self._replace_lost()
        try:
            yield
        finally:
            if self._in_turn:
                await self._replacements.cancel()

    def _replace_lost(self) -> None:
        """Begins to replace all that is missing, as far as restarts are left."""
        while self.num_missing and self._last_loss is not None and self._replacements.may_begin:
            if not self._replacements.take(self._last_loss):
                return
            lost = next((replica for replica in self._lost if replica.state is ReplicaState.DEAD), None)
            if lost is not None:
                self._become(lost, ReplicaState.RESTARTING)
            replica = self._newcomer()
            work = self._restart(replica, lost)
            task = self._replacements.begin(work, f"replacement {self.role}[{replica.index}]")
            task.add_done_callback(partial(self._given_up, replica, lost))

    async def _restart(self, replica: Replica, lost: Replica | None) -> None:
        try:
            await self._join(replica, lost)
        except WorkerError:  # the next one would have the same code
            raise
        except RlhfError as failure:
            if self._wanted:
                self._event("restart_failed", role=self.role, error=str(failure))
                self._last_loss = failure
                self._replace_lost()

    def _given_up(self, replica: Replica, lost: Replica | None, _: asyncio.Task[None]) -> None:
        """Leaves nothing of a replacement that was cancelled before it began."""
        if replica.state in JOINING:
            self._bury(replica)
            if lost in self._lost:
                self._become(lost, ReplicaState.DEAD)
        self._notice()

    async def _join_first(self, replica: Replica) -> None:
        """Joins a newcomer that ``scale`` asked for; one that is lost in its start is replaced like any other."""
        try:
            await self._join(replica)
            return
        except REPLACEABLE as error:
            if not self._wanted:  # it was stopped
                raise
            self._note_loss(replica, error)
        self._replace_lost()
        await self._replacements.ended()
        self._replacements.check()
        if (self.num_missing or not self._wanted) and self._last_loss is not None:
            raise self._last_loss

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
        self._note_loss(replica, error)

    # Health

    async def answered(self, replica: Replica) -> None:
        """Takes a suspect that has answered in again, after a welcome where others have been told something since.

        One that cannot be welcomed is lost.
        """
        replica.saw()
        if replica.state is not ReplicaState.SUSPECT:
            return
        if replica.missed_broadcast:
            self._become(replica, ReplicaState.STALE)
            try:
                await self._bring_up_to_date(replica)
            except RlhfError as error:
                self.lose(replica, error)
            if replica.state is not ReplicaState.HEALTHY:
                return
        else:
            self._become(replica, ReplicaState.HEALTHY)
        self._event("replica_recovered", role=self.role, replica=replica.index)

    def lose(self, replica: Replica, error: RlhfError) -> None:
        """Ends a replica that does not work any more and begins to replace it; what cannot be is an event."""
        self._drop(replica, error)
        if not self._in_turn:
            self._replace_lost()

    async def available(self) -> None:
        """Returns when a replica is healthy, or none can be expected to become so; begins to replace what is missing.

        Raises:
            DeadlineError: Nothing has changed for a start and a call's time.
            RlhfError: The defect of a replacement, or the loss of the learner that has to welcome it.
        """
        self._replacements.check()
        if not self._in_turn:
            self._replace_lost()
        while not self.healthy:
            async with self._replacing():
                if not self._may_serve_soon():
                    return
                await self._until(self._wait_is_over, "a healthy replica")
            self._replacements.check()

    def _wait_is_over(self) -> bool:
        return bool(self.healthy) or not self._may_serve_soon() or not self._replacements.may_begin

    async def one_apart(self) -> Replica:
        """A replica for an item under suspicion: one with nothing to do, or else the least busy one.

        It waits while one may come that has nothing to do, and never gives two such items to one replica.

        Raises:
            ReplicaLostError: Nobody is left.
        """
        while True:
            await self.available()
            free = [replica for replica in self._least_busy() if not replica.isolates]
            if free and not (free[0].in_flight and self._replacements.under_way):
                return free[0]
            if not self.healthy:
                raise ReplicaLostError(
                    self.role, found="no healthy replica", needed="one", action="See events.jsonl for the cause."
                )
            await self._next_change("a replica with nothing else to do")

    # Weights

    async def change_weights(self, welcome: Welcome, method: str, *args: Any) -> None:
        """Broadcasts a call that loads other weights, and welcomes newcomers to them from then on.

        No replica slips through: one that joins meanwhile is either among those that are called or waits, and then gets
        the new welcome. Those that fail are replaced; only where nobody is left, a newcomer is waited for.

        Raises:
            RlhfError: See ``repair``.
        """
        async with self.changing_weights():
            try:
                await self.broadcast(method, *args)
            except PublicationError:
                if self.healthy or not self._wanted:
                    raise
            self.welcome = welcome
        await self.repair()
