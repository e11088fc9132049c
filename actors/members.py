"""Who belongs to a fleet, and the waits for one of them to change."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from actors.dispatch import Dispatch, Event
from actors.replicas import JOINING, PRESENT, FleetLimits, Replica, ReplicaState, no_change
from rlhf.errors import DeadlineError, RlhfError


class Members(Dispatch):
    """The replicas of a fleet by their states; ``actors.fleet.Fleet`` adds how they come and go."""

    def __init__(self, role: str, event: Event, limits: FleetLimits) -> None:
        self.role = role
        self.limits = limits
        self._event = event
        self._replicas: list[Replica] = []
        self._lost: list[Replica] = []
        """Those that were lost and have no replacement that serves."""
        self._last_loss: RlhfError | None = None
        self._wanted = 0
        self._next_index = 0
        self._changed = asyncio.Event()
        self.ask: Callable[[Replica], Awaitable[object]] | None = None
        """Returns when a replica has answered a probe; set by whoever probes the fleet."""

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

    def _newcomer(self) -> Replica:
        replica = Replica(self._next_index)
        self._next_index += 1
        self._replicas.append(replica)
        return replica

    def _become(self, replica: Replica, state: ReplicaState) -> None:
        replica.become(state)
        self._notice()

    def _notice(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def suspect(self, replica: Replica, error: RlhfError) -> None:
        """Gives a replica no more work, as a probe of it is overdue; one that is leaving gets none anyway."""
        if replica.state is ReplicaState.HEALTHY:
            self._become(replica, ReplicaState.SUSPECT)
            self._event("replica_suspect", role=self.role, replica=replica.index, error=str(error))

    def _note_loss(self, replica: Replica, error: RlhfError) -> None:
        self._last_loss = error
        if self.num_missing > sum(other.state is ReplicaState.DEAD for other in self._lost):
            self._lost.append(replica)
        cost = {"detect_s": round(replica.silent_s, 3), "lost_steps": 0, "lost_tokens": replica.unfinished_tokens}
        self._event("replica_lost", role=self.role, replica=replica.index, **cost, error=str(error))

    def _forget_surplus(self) -> None:
        """Forgets lost replicas that nobody misses any more."""
        dead = [replica for replica in self._lost if replica.state is ReplicaState.DEAD]
        for replica in dead[self.num_missing :]:
            self._lost.remove(replica)

    async def _confirm(self) -> None:
        """Asks the healthy replicas whether they are there, before they take over what another one has failed with.

        A node that goes away takes several, and the work of one must not seem to have taken the next one down.
        """
        if self.ask is None:
            return
        asked = self.healthy
        answers = await asyncio.gather(*map(self.ask, asked), return_exceptions=True)
        for replica, answer in zip(asked, answers, strict=True):
            if isinstance(answer, DeadlineError):
                self.suspect(replica, answer)
            elif isinstance(answer, RlhfError):
                self.lose(replica, answer)
            elif isinstance(answer, BaseException):
                raise answer

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
        while not condition():
            await self._next_change(needed)

    async def _next_change(self, needed: str) -> None:
        limit_s = self.limits.start_timeout_s + self.limits.call_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.wait()
        except TimeoutError:
            raise no_change(self.role, self.states, limit_s, needed) from None
