"""How work is shared out over a fleet's replicas, and what happens to the work of one that fails.

The work of a replica that fails goes out once more, as a whole: most often a machine was lost, and the work had nothing
to do with it. It goes to the least busy of the others at once, while a replacement starts beside them; only where none
is left it waits for one. Where it takes a second replica down, it is under suspicion itself: it goes out a last time,
one item after the other, each to a replica that has nothing else to do where there is one or one is starting. An item
that fails a replica by itself is *poisoned*: it is given up, and what it has cost is not counted as restarts of the
fleet.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.calls import await_ref, gather_all, stream
from actors.replicas import FleetLimits, Replica, ReplicaState
from actors.restarts import RestartBudget
from rlhf.errors import (
    DeadlineError,
    EngineError,
    JudgeError,
    PublicationError,
    ReplicaLostError,
    RlhfError,
    ScorerError,
)

Event = Callable[..., None]
"""Writes one line of the event log: ``event(kind, role=..., replica=..., ...)``."""

Missing = Callable[[Any, str], Any]
"""What stands for the result of an item that was given up: of the item, and why."""

REPLACEABLE = (ReplicaLostError, DeadlineError, EngineError, JudgeError, ScorerError)
"""Failures that another replica may not have. Any other error lies in what was asked, or in the worker's own code, and
is raised at once."""


@dataclass
class _Job:
    """One scatter: ``send`` asks a replica for the items at these places and puts what comes into ``found``."""

    items: Sequence[Any]
    send: Callable[[Replica, Sequence[int]], asyncio.Future[None]]
    given_up: Callable[[int, str], None] | None
    found: dict[int, Any] = field(default_factory=dict)
    poisoned: set[int] = field(default_factory=set)
    sent: list[asyncio.Future[None]] = field(default_factory=list)
    """All that was sent, so that what is not awaited any more can be let go."""

    def dispatch(self, replica: Replica, places: Sequence[int]) -> asyncio.Future[None]:
        """Sends these items to a replica at once."""
        self.sent.append(self.send(replica, places))
        return self.sent[-1]

    def rest(self, places: Sequence[int]) -> list[int]:
        """Those of ``places`` that have neither come nor been given up."""
        return [place for place in places if place not in self.found and place not in self.poisoned]


class Dispatch(ABC):
    """The calls of a fleet; ``actors.fleet.Fleet`` adds who its replicas are."""

    role: str
    limits: FleetLimits
    backlog: int = 0
    """Items that were asked for and have not come, over all calls: what an autoscaler looks at."""
    _event: Event
    _restarts: RestartBudget

    @property
    @abstractmethod
    def healthy(self) -> list[Replica]:
        """Replicas that take work, in index order."""

    @property
    @abstractmethod
    def present(self) -> list[Replica]:
        """Replicas that are not dead, leavers included, in index order: those that can be asked something."""

    @abstractmethod
    def _drop(self, replica: Replica, error: RlhfError) -> None:
        """Ends a failed replica, which ``repair`` then replaces."""

    @abstractmethod
    def lose(self, replica: Replica, error: RlhfError) -> None:
        """Ends a failed replica and begins to replace it; nobody waits for that."""

    @abstractmethod
    async def replace(self, replica: Replica, error: RlhfError) -> None:
        """Ends a failed replica, begins to replace it, and returns when some replica is healthy."""

    @abstractmethod
    async def available(self) -> None:
        """Returns when a replica is healthy, or none can be expected to become so."""

    @abstractmethod
    async def one_apart(self) -> Replica:
        """A replica for an item under suspicion, which should take nobody else's work down."""

    @abstractmethod
    def _notice(self) -> None:
        """Wakes those who wait for a replica to become healthy or idle."""

    async def call(self, replica: Replica, method: str, *args: Any) -> Any:
        """One call of one replica, bounded in time."""
        return await self._submit(replica, method, *args)

    def _submit(self, replica: Replica, method: str, *args: Any, timeout_s: float | None = None) -> asyncio.Future[Any]:
        """Sends one call at once, so that no leave can come between the choice of a replica and its work."""
        ref = getattr(replica.handle, method).remote(*args)
        where = f"{self.role}[{replica.index}].{method}"
        limit = timeout_s or self.limits.call_timeout_s
        return self._track(replica, await_ref(ref, timeout_s=limit, where=where))

    def _track(self, replica: Replica, work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        replica.in_flight += 1
        replica.idle.clear()
        replica.saw()

        def finished(task: asyncio.Future[Any]) -> None:
            replica.in_flight -= 1
            if not replica.in_flight:
                replica.idle.set()
                self._notice()
            if not task.cancelled() and task.exception() is None:
                replica.saw()

        task = asyncio.ensure_future(work)
        task.add_done_callback(finished)
        return task

    async def broadcast(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Calls every replica that works; one that fails leaves the fleet and is replaced from the next ``repair`` on.

        A leaver still takes part: its last work may wait for the other half of what is broadcast. A suspect does not,
        and is welcomed as a newcomer is before it serves again. ``timeout_s``: instead of ``call_timeout_s``.

        Raises:
            PublicationError: No replica is left.
            RlhfError: What was asked cannot be done by any replica; none is dropped for it.
        """
        for replica in self.present:
            replica.missed_broadcast |= replica.state is ReplicaState.SUSPECT
        working = (ReplicaState.HEALTHY, ReplicaState.LEAVING)
        replicas = [replica for replica in self.present if replica.state in working]
        calls = [self._submit(replica, method, *args, timeout_s=timeout_s) for replica in replicas]
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

    async def scatter(self, method: str, items: Sequence[Any], *args: Any, missing: Missing | None = None) -> list[Any]:
        """Maps a list-to-list method over items: contiguous shares to replicas in index order, results in item order.

        A replica that fails loses its share only, which is dispatched again as the module says.

        Args:
            method: Of the workers.
            items: They carry ``uid``, for the log.
            *args: More arguments of the method.
            missing: What stands for a poisoned item. Without it the second failure of a share is raised.
        """

        def send(replica: Replica, places: Sequence[int]) -> asyncio.Future[None]:
            ref = getattr(replica.handle, method).remote([items[place] for place in places], *args)
            where = f"{self.role}[{replica.index}].{method}"

            async def receive() -> None:
                values = await await_ref(ref, timeout_s=self.limits.call_timeout_s, where=where)
                for place, value in zip(places, values, strict=True):
                    self._found(job, place, value)

            return self._track(replica, receive())

        def give_up(place: int, why: str) -> None:
            assert missing is not None, "asked for where there is one"
            self._found(job, place, missing(items[place], why))

        job = _Job(items, send, None if missing is None else give_up)
        await self._run(job)
        return [job.found[place] for place in range(len(items))]

    async def scatter_stream(self, method: str, items: Sequence[Any], *args: Any, may_lack: bool = False) -> list[Any]:
        """Like ``scatter`` for a streaming method; items and results carry ``uid``.

        What a replica delivered before it failed is kept; only the rest of its share is dispatched again. Where the
        results ``may_lack`` some, poisoned items are left out of them.
        """
        place_of = {item.uid: place for place, item in enumerate(items)}

        def send(replica: Replica, places: Sequence[int]) -> asyncio.Future[None]:
            share = [items[place] for place in places]
            refs = getattr(replica.handle, method).options(num_returns="streaming").remote(share, *args)
            where = f"{self.role}[{replica.index}].{method}"

            async def receive() -> None:
                async for value in stream(refs, timeout_s=self.limits.call_timeout_s, where=where):
                    replica.saw()
                    self._found(job, place_of[value.uid], value)
                if lacking := [items[place].uid for place in job.rest(places)]:
                    raise _short(where, lacking, len(share))

            return self._track(replica, receive())

        job = _Job(items, send, (lambda place, why: None) if may_lack else None)
        await self._run(job)
        return [job.found[place] for place in range(len(items)) if place in job.found]

    def _found(self, job: _Job, place: int, value: Any) -> None:
        if place not in job.found:
            self.backlog -= 1
        job.found[place] = value

    async def _run(self, job: _Job) -> None:
        await self.available()
        shares = self._shares(range(len(job.items)), self.healthy)
        self.backlog += len(job.items)
        try:
            work = [(replica, places, job.dispatch(replica, places)) for replica, places in shares]
            await gather_all(self._settle(job, *one) for one in work)
        finally:
            self.backlog -= len(job.items) - len(job.found)
            for sent in job.sent:
                sent.cancel()
            await asyncio.gather(*job.sent, return_exceptions=True)

    async def _settle(self, job: _Job, replica: Replica, places: Sequence[int], first: asyncio.Future[None]) -> None:
        """Sees one share through."""
        try:
            return await first
        except REPLACEABLE as error:
            if not (rest := job.rest(places)):  # it failed behind its work
                return self.lose(replica, error)
            await self.replace(replica, error)
        self._event("redispatched", role=self.role, replica=replica.index, num_items=len(rest))
        work = [(other, part, job.dispatch(other, part)) for other, part in self._shares(rest, self._least_busy())]
        await gather_all(self._settle_again(job, *one) for one in work)

    async def _settle_again(
        self, job: _Job, replica: Replica, places: Sequence[int], second: asyncio.Future[None]
    ) -> None:
        """Sees work through that one replica has failed with."""
        try:
            await second
        except REPLACEABLE as error:
            if not (rest := job.rest(places)):
                return self.lose(replica, error)
            if job.given_up is None:
                raise
            await self._isolate(job, replica, rest, error)

    async def _isolate(self, job: _Job, failed: Replica, places: Sequence[int], error: RlhfError) -> None:
        """Dispatches what two replicas failed with, item by item; those that fail a third one are given up.

        Raises:
            RlhfError: No replica is left and the restarts of this time are used up.
        """
        alone = len(places) == 1  # nothing else was with it the second time
        if alone:
            self._poison(job, places[0], error, cost=1)
        await self.replace(failed, error)
        if alone:
            self._restarts.give_back(1)
        cost = 2
        for place in job.rest(places):
            replica = await self.one_apart()
            replica.isolates = True
            try:
                await job.dispatch(replica, [place])
            except REPLACEABLE as failure:
                self._poison(job, place, failure, cost)
                await self.replace(replica, failure)
                self._restarts.give_back(1)
                cost = 0  # given back with the first
            finally:
                replica.isolates = False
                self._notice()

    def _poison(self, job: _Job, place: int, error: RlhfError, cost: int) -> None:
        assert job.given_up is not None, "asked for where it is allowed"
        job.poisoned.add(place)
        self._restarts.give_back(cost)
        self._event("item_poisoned", role=self.role, uid=job.items[place].uid, error=str(error))
        job.given_up(place, f"given up after it failed {self.role} again and again: {error.found}")

    def _least_busy(self) -> list[Replica]:
        """The healthy replicas with the fewest calls in flight, those without an item under suspicion first."""

        def load(replica: Replica) -> tuple[bool, int]:
            return replica.isolates, replica.in_flight

        least = min(map(load, self.healthy), default=None)
        return [replica for replica in self.healthy if load(replica) == least]

    def _shares(self, places: Sequence[int], replicas: Sequence[Replica]) -> list[tuple[Replica, Sequence[int]]]:
        if not replicas:
            raise ReplicaLostError(
                self.role, found="no healthy replica", needed="at least one", action="See events.jsonl for the cause."
            )
        bounds = [round(i * len(places) / len(replicas)) for i in range(len(replicas) + 1)]
        shares = [(r, places[a:b]) for r, a, b in zip(replicas, bounds[:-1], bounds[1:], strict=True)]
        return [(replica, share) for replica, share in shares if share]


def _short(where: str, lacking: Sequence[str], num_wanted: int) -> ReplicaLostError:
    return ReplicaLostError(
        where,
        found=f"a stream that ended without {lacking[0]!r} and {len(lacking) - 1} more",
        needed=f"all {num_wanted} results",
        action="See the worker's log for the cause.",
    )
