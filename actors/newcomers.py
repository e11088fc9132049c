"""How a replica comes to serve: it is placed, created, started and given the current weights."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.calls import await_ref, kill
from actors.dispatch import Event
from actors.members import Members
from actors.replacements import Replacements
from actors.replicas import ENDED, FleetLimits, Replica, ReplicaState
from rlhf.errors import LearnerError, ReplicaLostError

Welcome = Callable[[Any], Awaitable[None]]

_PLACING_THREADS = 32
"""Replicas of a fleet that may wait for room on the cluster at the same time."""

_FIRST_PAUSE_S = 1.0
"""Before an actor that never ran is created again; twice as long each time after that."""


class Newcomers(Members):
    """The replicas of a fleet and how they join it; ``actors.fleet.Fleet`` adds when they do, and how they leave.

    Args:
        role: Name in logs and errors.
        spawn: See ``Fleet``.
        retire: See ``Fleet``.
        event: Event log.
        limits: Deadlines and restarts.
    """

    def __init__(
        self, role: str, spawn: Callable[[int], Any], retire: Callable[[Any], None], event: Event, limits: FleetLimits
    ) -> None:
        super().__init__(role, event, limits)
        self._spawn = spawn
        self._retire = retire
        self._replacements = Replacements(role, limits, event, lambda: self._wanted)
        # The event loop's own threads are few, and newcomers that wait for room would keep them from everybody else.
        self._placing = ThreadPoolExecutor(_PLACING_THREADS, thread_name_prefix=f"place-{role}")
        self._welcome: Welcome | None = None
        self._weights = asyncio.Lock()

    @property
    def welcome(self) -> Welcome | None:
        """Brings a newcomer to the current weights before it serves; set by whoever publishes."""
        return self._welcome

    @welcome.setter
    def welcome(self, welcome: Welcome | None) -> None:
        self._welcome = welcome
        self._replacements.forgive_learner()
        self._notice()

    @contextlib.asynccontextmanager
    async def changing_weights(self) -> AsyncIterator[None]:
        """A block in which nobody is welcomed: whoever is being welcomed already serves before it begins."""
        async with self._weights:
            yield

    async def _join(self, replica: Replica, lost: Replica | None = None) -> None:
        """Starts and welcomes a newcomer; ``lost`` is whom it replaces."""
        began = time.monotonic()
        try:
            await self._start(replica)
            await self._bring_up_to_date(replica)
            self._require(replica, ReplicaState.HEALTHY)
        finally:
            if replica.state is not ReplicaState.HEALTHY:
                if lost in self._lost:
                    self._become(lost, ReplicaState.DEAD)
                self._bury(replica)
        self._replicas.sort(key=lambda other: other.index)
        told: dict[str, Any] = {"seconds": round(time.monotonic() - began, 3)}
        if lost in self._lost:
            self._lost.remove(lost)
            told |= {"replaces": lost.index, "recover_s": round(lost.silent_s, 3)}
        self._event("replica_joined", role=self.role, replica=replica.index, **told)

    async def _start(self, replica: Replica) -> None:
        """Brings a newcomer to where it can be welcomed.

        Until Ray knows that a node is gone it sends newcomers there, which then die without having run. Such a one is
        created again, with growing pauses: it says nothing of the fleet's health, and so costs no restart.

        Raises:
            RlhfError: It ran and was lost, or nothing ran within ``start_timeout_s`` of the first placement.
        """
        where = f"{self.role}[{replica.index}].start"
        replica.handle = await self._spawned(replica.index)
        deadline, pause_s = _now() + self.limits.start_timeout_s, _FIRST_PAUSE_S
        while True:
            try:
                await await_ref(replica.handle.__ray_ready__.remote(), timeout_s=_left(deadline), where=where)
                break
            except ReplicaLostError as error:
                if replica.state is not ReplicaState.STARTING or pause_s >= _left(deadline):
                    raise
                self._event("start_repeated", role=self.role, replica=replica.index, error=str(error))
                self._end_actor(replica)
                replica.handle = None
            await asyncio.sleep(pause_s)
            self._require(replica, ReplicaState.STARTING)
            pause_s *= 2
            replica.handle = await self._spawned(replica.index)
        self._require(replica, ReplicaState.STARTING)
        await await_ref(replica.handle.start.remote(), timeout_s=_left(deadline), where=where)
        self._require(replica, ReplicaState.STARTING)
        self._become(replica, ReplicaState.STALE)

    async def _spawned(self, index: int) -> Any:
        """Places and creates an actor; one whose join is given up meanwhile is ended as soon as it is there."""
        placed = asyncio.get_running_loop().run_in_executor(self._placing, self._spawn, index)
        try:
            return await asyncio.shield(placed)
        except asyncio.CancelledError:
            placed.add_done_callback(self._end_late)
            raise

    def _end_late(self, placed: asyncio.Future[Any]) -> None:
        if not placed.cancelled() and placed.exception() is None:
            kill(placed.result())
            self._retire(placed.result())

    async def _bring_up_to_date(self, replica: Replica) -> None:
        """Makes a stale replica healthy.

        One whose learner is lost is at no fault: it waits for the welcome of the next one. The loss is kept for the
        fleet's next call, whose caller restarts the learner.

        Raises:
            RlhfError: It could not be welcomed, or no other learner came for a start and a call's time.
        """
        while replica.state is ReplicaState.STALE:
            async with self._weights:  # healthy before other weights come, or welcomed to those
                welcome = self.welcome
                try:
                    if welcome is not None:
                        await welcome(replica.handle)
                    if replica.state is ReplicaState.STALE:  # unless it ended meanwhile
                        replica.missed_broadcast = False
                        replica.saw()
                        self._become(replica, ReplicaState.HEALTHY)
                    return
                except LearnerError as error:
                    lost = error
            if self.welcome == welcome:
                self._replacements.note(lost)
                self._notice()
                await self._until(self._welcome_changes(replica, welcome), "the weights of another learner")

    def _welcome_changes(self, replica: Replica, welcome: Welcome | None) -> Callable[[], bool]:
        return lambda: self.welcome != welcome or replica.state is not ReplicaState.STALE

    def _require(self, replica: Replica, state: ReplicaState) -> None:
        """Raises where a newcomer was ended by others than its join."""
        if replica.state is not state:
            raise ReplicaLostError(
                f"{self.role}[{replica.index}].start",
                found="a fleet that was stopped meanwhile",
                needed="a fleet",
                action="Nothing: it is ended.",
            )

    def _bury(self, replica: Replica) -> None:
        if replica.state not in ENDED:
            self._become(replica, ReplicaState.DEAD)
        if replica in self._replicas:
            self._replicas.remove(replica)
        self._end_actor(replica)

    def _end_actor(self, replica: Replica) -> None:
        if replica.handle is not None:
            kill(replica.handle)
            self._retire(replica.handle)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _left(deadline: float) -> float:
    return max(deadline - _now(), 0.0)
