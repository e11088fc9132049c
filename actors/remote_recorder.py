"""The driver's side of the run's recorder: calls that outlast its restarts, and a watch over it.

Ray restarts the recorder's actor where its process or its node goes away: under the same handle, with the same
arguments, on any node that has its labels and room. What it owned in the object store is gone then. Whoever reads a
handle of before is told so (``RolloutsLostError``), and the groups are drawn again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorDiedError

from actors.calls import await_ref, kill, restart
from actors.health import HEALTH_GROUP
from actors.prober import ProbeLimits
from actors.replicas import FleetLimits
from actors.restarts import RestartBudget
from actors.store import may_come_back, recorder_gone
from rlhf.errors import DeadlineError, RecordError, ReplicaLostError, RlhfError

ROLE = "recorder"

ASK_AGAIN_S = 0.5
"""Between two questions to a recorder that is being restarted; Ray itself takes a second to refuse one."""


class RemoteRecorder:
    """The one ``RecorderWorker`` of a run, over all its restarts.

    A call that finds it away goes out again when it is back, as each of its methods may be repeated. Only the driver
    counts restarts; once those of this time are used up it ends the actor for good, and whoever needs it is told.

    Args:
        handle: The actor. To be watched, it needs a thread for probes (``HEALTH_GROUP``).
        event: Writes one line of the event log: ``event(kind, role=..., ...)``.
        limits: Longest wait for a restart (``start_timeout_s``), and how many restarts within which time.
        probes: How often it is asked whether it is there, and how long an answer may take.
        timeout_s: Longest wait for one call, restarts included.
    """

    def __init__(
        self,
        handle: Any,
        event: Callable[..., None] = lambda kind, **fields: None,
        *,
        limits: FleetLimits | None = None,
        probes: ProbeLimits | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.handle = handle
        self._event = event
        self._limits = limits or FleetLimits()
        self._probes = probes or ProbeLimits()
        self._timeout_s = timeout_s
        self._budget = RestartBudget(self._limits.max_restarts, self._limits.restart_window_s, clock=self._now)
        self._num_restarts = 0
        self._process = ""
        self._seen = 0.0
        self._lost_at: float | None = None
        """Its last sign of life, while it is away."""
        self._noticed_at = 0.0
        self._gone: RecordError | None = None

    async def start(self) -> None:
        """Returns when the recorder answers."""
        self._answered(await self.call("ping"))

    async def call(self, method: str, *args: Any) -> Any:
        """Calls one method of the worker, again where it was lost meanwhile.

        Raises:
            RecordError: The recorder is gone for good, or what it raised itself.
            DeadlineError: It did not answer in time.
            RlhfError: What it raised.
        """
        where = f"{ROLE}.{method}"
        deadline = self._now() + self._timeout_s
        while True:
            await self._returned(where, deadline)
            sent = self._now()
            ref = getattr(self.handle, method).remote(*args)
            try:
                found = await await_ref(ref, timeout_s=max(deadline - sent, 0.0), where=where)
            except ReplicaLostError as error:
                self._failed(error, sent)
            else:
                self._seen = self._now()
                return found

    async def watch(self) -> None:
        """Asks the recorder every now and then whether it is there, until it is cancelled or the recorder is gone.

        A loss that no call has met is noticed here, and so is a process that hangs: it misses two probes, is ended, and
        Ray starts another one.
        """
        while self._gone is None:
            await asyncio.sleep(self._probes.every_s)
            try:
                await self.look()
            except RecordError:  # the next call says so too
                return

    async def look(self) -> None:
        """Asks once, and sees a loss through until the recorder is back.

        Raises:
            RecordError: It is gone for good.
        """
        self._check()
        sent = self._now()
        try:
            self._answered(await self._ask_twice())
        except DeadlineError as error:
            self._lose(error, sent)
            if self._gone is None:
                restart(self.handle)
        except ReplicaLostError as error:
            self._failed(error, sent)
        await self._returned(f"{ROLE}.ping", None)

    async def _ask(self) -> str:
        ref = self.handle.ping.options(concurrency_group=HEALTH_GROUP).remote()
        process: str = await await_ref(ref, timeout_s=self._probes.timeout_s, where=f"{ROLE}.ping")
        return process

    async def _ask_twice(self) -> str:
        try:
            return await self._ask()
        except DeadlineError:  # what is merely busy answers the second time
            return await self._ask()

    async def _returned(self, where: str, deadline: float | None) -> None:
        """Returns when the recorder answers again, within its ``start_timeout_s`` and by the deadline."""
        while self._lost_at is not None:
            self._check()
            now = self._now()
            if now - self._noticed_at > self._limits.start_timeout_s:
                error = _lost(where, f"no restart within {self._limits.start_timeout_s:.0f} s")
                self._give_up(error, "restart_failed")
            elif deadline is not None and now > deadline:
                raise _late(where, self._timeout_s)
            else:
                await asyncio.sleep(ASK_AGAIN_S)
                try:
                    self._answered(await self._ask())
                except DeadlineError:
                    continue  # its node is cut off, or dying
                except ReplicaLostError as error:
                    self._failed(error, now)
        self._check()

    def _failed(self, error: ReplicaLostError, sent: float) -> None:
        """Takes note of a call that failed; raises what is no loss, or one for good."""
        cause = error.__cause__
        if may_come_back(cause):
            self._lose(error, sent)
        elif isinstance(cause, ActorDiedError):
            self._lose(error, sent)
            self._lost_at = None
            self._gone = self._gone or recorder_gone(error.where, cause)
            raise self._gone from error
        else:
            raise error

    def _lose(self, error: RlhfError, sent: float) -> None:
        if self._lost_at is not None or self._gone is not None:  # another call was here first
            return
        self._noticed_at = self._now()
        self._lost_at = max(self._seen, sent)
        detect_s = round(self._noticed_at - self._lost_at, 3)
        self._event(
            "replica_lost",
            role=ROLE,
            replica=self._num_restarts,
            detect_s=detect_s,
            lost_steps=0,
            lost_tokens=0,
            error=str(error),
        )
        if not self._budget.take():
            limits = {name: getattr(self._limits, name) for name in ("max_restarts", "restart_window_s")}
            self._give_up(error, "restarts_used_up", **limits)

    def _give_up(self, error: RlhfError, kind: str, **told: Any) -> None:
        """Ends the recorder for good, so that nobody waits for it any more."""
        self._event(kind, role=ROLE, **told, error=str(error))
        self._gone = recorder_gone(error.where, error)
        self._lost_at = None
        kill(self.handle)

    def _answered(self, process: str) -> None:
        """Takes note of an answer, and of whether it comes from the process that answered before."""
        now = self._now()
        if self._lost_at is None and self._process in ("", process):
            self._process, self._seen = process, now
            return
        self._lose(_lost(ROLE, "another process than before"), self._seen)
        if self._gone is not None or self._lost_at is None:
            return
        lost_at, self._lost_at, self._seen = self._lost_at, None, now
        if process == self._process:  # it could not be reached, and has lost nothing
            self._budget.give_back(1)
            self._event("replica_recovered", role=ROLE, replica=self._num_restarts)
            return
        self._process = process
        self._num_restarts += 1
        self._event(
            "replica_joined",
            role=ROLE,
            replica=self._num_restarts,
            seconds=round(now - self._noticed_at, 3),
            replaces=self._num_restarts - 1,
            recover_s=round(now - lost_at, 3),
        )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _check(self) -> None:
        if self._gone is not None:
            raise self._gone


def _lost(where: str, found: str) -> ReplicaLostError:
    return ReplicaLostError(where, found=found, needed="the recorder", action="See its log for the cause.")


def _late(where: str, timeout_s: float) -> DeadlineError:
    return DeadlineError(
        where,
        found=f"no recorder after {timeout_s:.0f} s",
        needed="an answer",
        action="Look in events.jsonl for what it was lost to, and for a node that has room for it.",
    )
