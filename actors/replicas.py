"""What a fleet knows of one replica: its state, and which states may follow which."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.errors import DeadlineError


class ReplicaState(StrEnum):
    """Where a replica stands. ``TRANSITIONS`` says what may follow.

    - *starting*: it is being placed, created and loaded. It is not probed: a start has its own timeout.
    - *stale*: it is alive, without the current weights: a newcomer before its welcome, or a suspect that answers again
      after others were given new weights. It gets no work until it is welcomed.
    - *healthy*: it answers and holds the current weights. Only a healthy replica is given work.
    - *suspect*: a probe of it is overdue. It keeps the work that it has and gets no other, and takes no part in
      broadcasts. An answer makes it healthy again, or stale; a second missed probe ends it.
    - *leaving*: it finishes its last work and is then stopped.
    - *dead*: its actor is ended and its place given back.
    - *restarting*: it is dead, and the replica that replaces it, under another index, is starting.
    """

    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    LEAVING = "leaving"
    DEAD = "dead"
    RESTARTING = "restarting"


TRANSITIONS: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.STARTING: frozenset({ReplicaState.STALE, ReplicaState.DEAD}),
    ReplicaState.STALE: frozenset({ReplicaState.HEALTHY, ReplicaState.DEAD}),
    ReplicaState.HEALTHY: frozenset({ReplicaState.SUSPECT, ReplicaState.LEAVING, ReplicaState.DEAD}),
    ReplicaState.SUSPECT: frozenset(
        {ReplicaState.HEALTHY, ReplicaState.STALE, ReplicaState.LEAVING, ReplicaState.DEAD}
    ),
    ReplicaState.LEAVING: frozenset({ReplicaState.DEAD}),
    ReplicaState.DEAD: frozenset({ReplicaState.RESTARTING}),
    # Its replacement serves, and it is forgotten; or that could not start, and it waits for another.
    ReplicaState.RESTARTING: frozenset({ReplicaState.DEAD}),
}
"""Every change of state that a replica may make."""

JOINING = frozenset({ReplicaState.STARTING, ReplicaState.STALE})
ENDED = frozenset({ReplicaState.DEAD, ReplicaState.RESTARTING})
PRESENT = JOINING | {ReplicaState.HEALTHY, ReplicaState.SUSPECT}
"""States of those that count as replicas of the fleet: nobody has to be started for them."""


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(eq=False)
class Replica:
    """One actor of a fleet.

    Attributes:
        index: Its number; a replacement has another one.
        handle: The actor; None until it was created.
        state: Changed by ``become`` only.
        idle: Set while no call of it is in flight.
        in_flight: Calls of it that are.
        seen: When it last gave a sign of life, or was last called: seconds of the monotonic clock.
        unfinished_tokens: What it had drawn and not delivered at its last probe.
        missed_broadcast: Whether others were told something while it was suspect.
        isolates: Whether it works on an item that is under suspicion.
    """

    index: int
    handle: Any = None
    state: ReplicaState = ReplicaState.STARTING
    idle: asyncio.Event = field(default_factory=_set_event)
    in_flight: int = 0
    seen: float = field(default_factory=time.monotonic)
    unfinished_tokens: int = 0
    missed_broadcast: bool = False
    isolates: bool = False

    def become(self, state: ReplicaState) -> None:
        """Changes the state."""
        assert state in TRANSITIONS[self.state], f"replica {self.index} cannot go from {self.state} to {state}"
        self.state = state

    def saw(self) -> None:
        """Notes a sign of life."""
        self.seen = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life, or since the last call was sent where that is later."""
        return time.monotonic() - self.seen


@dataclass(frozen=True)
class FleetLimits:
    """Deadlines of a fleet in seconds, and how many dead replicas are replaced within a time before it is given up.

    Attributes:
        start_timeout_s: Longest time from a replica's placement to the end of its start.
        call_timeout_s: Longest wait for one call.
        max_restarts: Restarts for each replica that is wanted, all together; see ``RestartBudget``.
        restart_window_s: Seconds after which a restart no longer counts.
    """

    start_timeout_s: float = 600.0
    call_timeout_s: float = 1800.0
    max_restarts: int = 3
    restart_window_s: float = 3600.0


def no_change(role: str, states: Mapping[str, int], limit_s: float, needed: str) -> DeadlineError:
    """The error of a wait for replicas to change that did not end in time."""
    return DeadlineError(
        role,
        found=f"replicas that are {dict(states)} after {limit_s:.0f} s",
        needed=needed,
        action="See events.jsonl and the workers' logs for the cause.",
    )
