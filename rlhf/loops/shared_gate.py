"""The shared gate: whose weights, caches and optimizer states are in the memory of GPUs that several roles share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from rlhf.loops.gate import BudgetGate

Mover = Callable[[frozenset[str]], Awaitable[None]]
"""Brings a role to where exactly these of its parts are in device memory; may be asked for the same twice."""

Parts = Mapping[str, frozenset[str]]
"""Parts by role, for example ``{"generation": {"weights", "kv_cache"}}``."""


@dataclass
class _Member:
    """One role on the shared devices; ``resident`` is None while nobody can say what of it is there."""

    parts: frozenset[str]
    move: Mover
    resident: frozenset[str] | None


class SharedGate:
    """A device budget of memory: one phase computes at a time, and what it does not need makes room for what it needs.

    Each role on the devices is made of parts that can be put aside in host memory and brought back (an engine: weights
    and cache; a learner: weights and optimizer state). A phase names the parts that it needs. On entry everything else
    is put aside first, whatever role it belongs to, and only then is brought in what is missing, so that the sum never
    rises above what the two neighbouring phases need by themselves. Nothing moves at the end of a phase: the next one
    may be of the same role, or share parts with it, as publication does with both of its neighbours (the engines'
    weights come before their cache).

    A move that fails or is cancelled leaves the role in an unknown state. The error is the phase's own; the next phase
    begins by putting that role aside as a whole.

    produces: permission to compute. consumes: nothing. waits for: earlier phases, in order of arrival, and for the
    moves, which bound their own time. unblocked by: the end of a phase. No phase asks while it holds.

    Args:
        phases: What each phase needs; a phase that is not named waits for nothing and moves nothing.
    """

    def __init__(self, phases: Mapping[str, Parts]) -> None:
        self._phases = dict(phases)
        self._turn = BudgetGate(dict.fromkeys(phases, 1.0))
        self._members: dict[str, _Member] = {}

    def join(self, role: str, parts: frozenset[str], move: Mover) -> None:
        """Counts a role from here on, all of it in device memory. Call it inside the phase in which the role started.

        Args:
            role: Name in the phases.
            parts: All that it is made of.
            move: Moves the parts.
        """
        self._members[role] = _Member(parts, move, parts)

    def leave(self, role: str) -> None:
        """Forgets a role whose processes have ended or are about to; one that never joined is none."""
        self._members.pop(role, None)

    def hold(self, role: str) -> AbstractAsyncContextManager[None]:
        """A context in which the phase ``role`` may compute, with all that it needs in device memory."""
        return self._hold(role)

    @asynccontextmanager
    async def _hold(self, phase: str) -> AsyncIterator[None]:
        async with self._turn.hold(phase):
            if phase in self._phases:
                await self._make_room(self._phases[phase])
            yield

    async def _make_room(self, needs: Parts) -> None:
        members = [(member, needs.get(role, frozenset()) & member.parts) for role, member in self._members.items()]
        for member, wanted in members:
            if member.resident is None:
                await self._move(member, frozenset())
            elif member.resident - wanted:
                await self._move(member, member.resident & wanted)
        for member, wanted in members:
            if member.resident != wanted:
                await self._move(member, wanted)

    async def _move(self, member: _Member, parts: frozenset[str]) -> None:
        member.resident = None
        await member.move(parts)
        member.resident = parts
