"""Probes: one task per fleet or gang asks its workers how they are, and ends what hangs long before a call's timeout.

A worker that does not answer in time is asked once more: what is merely busy answers then. One that misses two probes,
whose engine is dead, or whose work makes no progress for long is ended, and its work goes to another.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any

from actors.calls import await_ref
from actors.fleet import Fleet
from actors.gang import LearnerGang
from actors.health import HEALTH_GROUP, Probe
from actors.replicas import Replica, ReplicaState
from rlhf.errors import DeadlineError, ReplicaLostError, RlhfError

OnStall = Callable[[str, float], Awaitable[None]]
"""Is told who makes no progress, and for how many seconds, before it is ended; what it raises is not expected."""

PROBED = frozenset({ReplicaState.HEALTHY, ReplicaState.SUSPECT, ReplicaState.LEAVING})
"""States of replicas that are probed. A start, and the welcome that ends it, have timeouts of their own."""


@dataclass(frozen=True)
class ProbeLimits:
    """When probes are sent, when they are overdue, and how long work may stand still; seconds."""

    every_s: float = 10.0
    timeout_s: float = 30.0
    stall_timeout_s: float = 600.0


class Prober(ABC):
    """Probes the workers of one role until it is cancelled; each worker by itself, so that none waits for another.

    Args:
        role: Name in errors.
        limits: Times.
        on_stall: Called before a worker is ended that has made no progress.
        in_loop: Whether the workers answer from their event loop (``ProbedLoop``).
    """

    def __init__(self, role: str, limits: ProbeLimits, on_stall: OnStall, *, in_loop: bool) -> None:
        self.role = role
        self.num_done = 0
        """Pieces of work that probes have seen done, over all workers; a sign of progress."""
        self._limits = limits
        self._on_stall = on_stall
        self._options = {} if in_loop else {"concurrency_group": HEALTH_GROUP}
        self._done_by: dict[Hashable, int] = {}

    async def run(self) -> None:
        """Probes everybody every ``every_s`` seconds."""
        checks: dict[Hashable, asyncio.Task[None]] = {}
        try:
            while True:
                await asyncio.sleep(self._limits.every_s)
                checks = {worker: check for worker, check in checks.items() if not check.done()}
                for worker in self._workers():
                    if worker not in checks:
                        checks[worker] = asyncio.create_task(self._check(worker))
        finally:
            for check in checks.values():
                check.cancel()
            await asyncio.gather(*checks.values(), return_exceptions=True)

    async def _check(self, worker: Any) -> None:
        where = f"{self.role}[{self._index(worker)}].probe"
        timeout_s = self._limits.timeout_s
        try:
            try:
                probe = await self._probe(worker, where)
            except DeadlineError as error:
                self._overdue(worker, error)
                probe = await self._probe(worker, where)
        except DeadlineError:
            await self._end(worker, _lost(where, f"no answer to two probes of {timeout_s:g} s each"))
        except RlhfError as error:
            await self._end(worker, error)
        else:
            await self._answered(worker, probe)

    async def _probe(self, worker: Any, where: str) -> Probe:
        method = self._handle(worker).probe
        ref = (method.options(**self._options) if self._options else method).remote()
        probe: Probe = await await_ref(ref, timeout_s=self._limits.timeout_s, where=where)
        return probe

    async def _answered(self, worker: Any, probe: Probe) -> None:
        self.num_done += max(0, probe.num_done - self._done_by.get(worker, 0))
        self._done_by[worker] = probe.num_done
        if probe.stalled_s < self._limits.stall_timeout_s:
            await self._well(worker, probe)
            return
        who = f"{self.role}[{self._index(worker)}]"
        await self._on_stall(who, probe.stalled_s)
        await self._end(worker, _lost(who, f"no progress of its work for {probe.stalled_s:.0f} s"))

    @abstractmethod
    def _workers(self) -> list[Any]:
        """Who is probed now."""

    @abstractmethod
    def _index(self, worker: Any) -> int:
        """The worker's number in its role."""

    @abstractmethod
    def _handle(self, worker: Any) -> Any:
        """The worker's actor."""

    @abstractmethod
    def _overdue(self, worker: Any, error: RlhfError) -> None:
        """A probe was missed."""

    @abstractmethod
    async def _well(self, worker: Any, probe: Probe) -> None:
        """A probe was answered, and the work goes on."""

    @abstractmethod
    async def _end(self, worker: Any, error: RlhfError) -> None:
        """The worker is of no more use."""


class FleetProber(Prober):
    """Probes the replicas of a fleet; one that is ended is replaced as the fleet does it.

    Args:
        fleet: Whose.
        limits: See ``Prober``.
        on_stall: See ``Prober``.
        in_loop: See ``Prober``.
    """

    def __init__(self, fleet: Fleet, limits: ProbeLimits, on_stall: OnStall, *, in_loop: bool) -> None:
        super().__init__(fleet.role, limits, on_stall, in_loop=in_loop)
        self._fleet = fleet
        fleet.ask = self._ask

    def _workers(self) -> list[Replica]:
        return [replica for replica in self._fleet.present if replica.state in PROBED]

    def _index(self, worker: Replica) -> int:
        return worker.index

    def _handle(self, worker: Replica) -> Any:
        return worker.handle

    async def _ask(self, worker: Replica) -> None:
        await self._probe(worker, f"{self.role}[{worker.index}].probe")

    def _overdue(self, worker: Replica, error: RlhfError) -> None:
        self._fleet.suspect(worker, error)

    async def _well(self, worker: Replica, probe: Probe) -> None:
        worker.unfinished_tokens = probe.unfinished_tokens
        await self._fleet.answered(worker)

    async def _end(self, worker: Replica, error: RlhfError) -> None:
        self._fleet.lose(worker, error)


class GangProber(Prober):
    """Probes the ranks of a gang; one that is lost ends the gang, whose pending call then fails."""

    def __init__(self, gang: LearnerGang, limits: ProbeLimits, on_stall: OnStall) -> None:
        super().__init__(gang.role, limits, on_stall, in_loop=False)
        self._gang = gang

    def _workers(self) -> list[Any]:
        return list(self._gang.ranks)

    def _index(self, worker: Any) -> int:
        return self._gang.ranks.index(worker) if worker in self._gang.ranks else -1

    def _handle(self, worker: Any) -> Any:
        return worker

    def _overdue(self, worker: Any, error: RlhfError) -> None:
        """It may answer the next; the gang does what it is at meanwhile."""

    async def _well(self, worker: Any, probe: Probe) -> None:
        self._gang.saw(worker)

    async def _end(self, worker: Any, error: RlhfError) -> None:
        if worker in self._gang.ranks:  # else the gang has ended meanwhile
            self._gang.give_up(error, worker)


def _lost(where: str, found: str) -> ReplicaLostError:
    return ReplicaLostError(
        where, found=found, needed="a worker that answers and gets on", action="See its log, and RUN/stacks."
    )
