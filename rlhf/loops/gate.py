"""The budget gate: who may compute when roles share cores."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from rlhf.errors import ConfigError, DeadlineError
from rlhf.protocols import PhaseGate, RewardSource
from rlhf.types import GroupHandle, Score

WAIT_LIMIT_S = 24 * 3600.0
"""Longest wait for a turn, in seconds. Nobody waits for an offline stage, which alone may take longer."""


class BudgetGate:
    """A device budget that roles acquire and release, first come, first served.

    On a machine with few cores every role's share is the whole budget, so one role computes at a time with all cores:
    overlap there costs more than it saves. ``rlhf.loops.shared_gate`` adds what roles on the same GPUs need.

    produces: permission to compute. consumes: nothing. waits for: enough free budget, in order of arrival.
    unblocked by: another role's release. A role never asks while it holds, so there is no cycle to deadlock in, and
    every call that a holder makes has a timeout of its own. A role that takes nothing never waits.

    Args:
        shares: Budget taken by each role, of ``capacity``; a role that is not named takes nothing.
        capacity: The whole budget.
        timeout_s: Longest wait of a role: more than all phases before it can take, so that only a defect reaches it.
    """

    def __init__(self, shares: Mapping[str, float], *, capacity: float = 1.0, timeout_s: float = WAIT_LIMIT_S) -> None:
        for role, share in shares.items():
            if not 0.0 <= share <= capacity:
                raise ConfigError(
                    f"gate share of {role}",
                    found=str(share),
                    needed=f"a number from 0 to {capacity}",
                    action="A share above the capacity could never be granted.",
                )
        self._shares = dict(shares)
        self._free = capacity
        self._timeout_s = timeout_s
        self._holders: list[str] = []
        self._queue: deque[tuple[float, asyncio.Future[None]]] = deque()

    def hold(self, role: str) -> AbstractAsyncContextManager[None]:
        """A context in which ``role`` may compute.

        Raises:
            DeadlineError: Those before it have not released in ``timeout_s``.
        """
        return self._hold(role)

    @asynccontextmanager
    async def _hold(self, role: str) -> AsyncIterator[None]:
        share = self._shares.get(role, 0.0)
        await self._acquire(role, share)
        self._holders.append(role)
        try:
            yield
        finally:
            self._holders.remove(role)
            self._free += share
            self._admit()

    async def _acquire(self, role: str, share: float) -> None:
        if share == 0.0:
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((share, granted))
        self._admit()
        try:
            async with asyncio.timeout(self._timeout_s):
                await granted
        except asyncio.CancelledError:
            self._give_up(share, granted)
            raise
        except TimeoutError:
            self._give_up(share, granted)
            raise DeadlineError(
                f"phase gate, {role}",
                found=f"{', '.join(self._holders) or 'nobody'} at work after {self._timeout_s:.0f} s",
                needed="the end of the phases before it",
                action="See events.jsonl and the workers' logs for what does not end; the same command resumes.",
            ) from None

    def _give_up(self, share: float, granted: asyncio.Future[None]) -> None:
        if granted.done() and not granted.cancelled():
            self._free += share
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            share, granted = self._queue[0]
            if not granted.cancelled():
                if share > self._free + 1e-9:
                    return
                self._free -= share
                granted.set_result(None)
            self._queue.popleft()


class GatedSource:
    """A reward source that computes only while its role holds the gate.

    A mixture asks sources of several roles one after the other; each has to be let in, and accounted for, by itself.

    Args:
        source: Does the scoring.
        gate: Who may compute.
        role: Whose devices the source computes on.
    """

    def __init__(self, source: RewardSource, gate: PhaseGate, role: str) -> None:
        self.name = source.name
        self._source = source
        self._gate = gate
        self._role = role

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """See ``RewardSource.score``."""
        async with self._gate.hold(self._role):
            return await self._source.score(groups)
