"""The autoscaler: replicas of a stateless role from the length of its queue.

It asks for replicas, and Ray's own autoscaler for nodes: a replica that finds no room leaves a placement group waiting,
which is what makes Ray add a node where it may. The run goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from rlhf.config import StrictModel
from rlhf.errors import RlhfError

if TYPE_CHECKING:
    from actors.dispatch import Event
    from actors.fleet import Fleet


class AutoscaleConfig(StrictModel):
    """Bounds and pace of one role's autoscaler."""

    min_replicas: int = Field(default=1, ge=1)
    """Never fewer replicas than this."""
    max_replicas: int = Field(ge=1)
    """Never more."""
    target_items_per_replica: float = Field(gt=0)
    """Prompts or groups, in work or waiting, that one replica should have, as a mean over the window. Times in which
    the role has nothing to do count as 0."""
    tolerance: float = Field(default=0.2, ge=0, lt=1)
    """Nothing changes while the load of a replica is within this fraction of the target."""
    window_s: float = Field(default=60.0, gt=0)
    """Seconds over which the queue is averaged; nothing changes before one window has passed."""
    cooldown_s: float = Field(default=300.0, ge=0)
    """Least seconds from one change to the next."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> AutoscaleConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas no higher than max_replicas")
        return self


@dataclass
class Window:
    """The queue's length over the last seconds.

    Attributes:
        length_s: How far back it reaches.
    """

    length_s: float
    _samples: deque[tuple[float, float]] = field(default_factory=deque)

    def add(self, now: float, num_items: float) -> None:
        """Notes the queue's length from ``now`` on (seconds of a clock that only grows)."""
        self._samples.append((now, num_items))
        while len(self._samples) > 1 and self._samples[1][0] <= now - self.length_s:
            self._samples.popleft()

    def mean(self, now: float) -> float | None:
        """Mean length, weighted by time; None until the window is full."""
        if not self._samples or self._samples[0][0] > now - self.length_s:
            return None
        total, later = 0.0, now
        for at, num_items in reversed(self._samples):
            begins = max(at, now - self.length_s)
            total += num_items * (later - begins)
            later = begins
        return total / self.length_s


def wanted_replicas(config: AutoscaleConfig, num_replicas: int, mean_items: float) -> int:
    """How many replicas a load asks for: a pure function, without cool-down.

    Up and down have different thresholds, so that the number that one of them chooses is left alone by the other under
    the same load.

    Args:
        config: Bounds and target.
        num_replicas: Replicas now.
        mean_items: Items in work or waiting, of the whole role.
    """
    busiest = config.target_items_per_replica * (1 + config.tolerance)
    idlest = config.target_items_per_replica * (1 - config.tolerance)
    wanted = num_replicas
    if mean_items > num_replicas * busiest:
        wanted = math.ceil(mean_items / config.target_items_per_replica)
    else:
        wanted = min(num_replicas, math.ceil(mean_items / idlest))
    return min(max(wanted, config.min_replicas), config.max_replicas)


class Autoscaler:
    """The policy over time: a window, and a cool-down after each change.

    Args:
        config: Bounds and pace.
        now: The clock's first reading, seconds.
    """

    def __init__(self, config: AutoscaleConfig, now: float) -> None:
        self._config = config
        self._window = Window(config.window_s)
        self._changed_at = now - config.cooldown_s

    def decide(self, now: float, num_replicas: int, num_items: float) -> int:
        """Notes the queue's length and returns how many replicas there should be from now on."""
        self._window.add(now, num_items)
        mean = self._window.mean(now)
        if mean is None or now - self._changed_at < self._config.cooldown_s:
            return num_replicas
        wanted = wanted_replicas(self._config, num_replicas, mean)
        if wanted != num_replicas:
            self._changed_at = now
        return wanted


async def autoscale(
    fleet: Fleet,
    config: AutoscaleConfig,
    event: Event,
    *,
    interval_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Keeps a fleet at the size that its queue asks for, until it is cancelled.

    A newcomer that finds no room within its ``start_timeout_s`` is given up and an event; after the cool-down it may be
    asked for again. One change is made at a time, beside the fleet's work.

    Args:
        fleet: Whose ``backlog`` is watched.
        config: Bounds and pace.
        event: Event log.
        interval_s: Seconds between two looks.
        clock: For tests.
    """
    policy = Autoscaler(config, clock())
    change: asyncio.Task[None] | None = None
    try:
        while True:
            await asyncio.sleep(interval_s)
            now, before = clock(), fleet.wanted
            wanted = policy.decide(now, before, fleet.backlog)
            if wanted != before and (change is None or change.done()):
                event("autoscaled", role=fleet.role, before=before, replicas=wanted, items=fleet.backlog)
                change = asyncio.create_task(_scale(fleet, wanted, event))
    finally:
        if change is not None:
            change.cancel()
            await asyncio.gather(change, return_exceptions=True)


async def _scale(fleet: Fleet, wanted: int, event: Event) -> None:
    try:
        await fleet.scale(wanted)
    except RlhfError as error:  # the run goes on with the replicas that it has
        event("scaling_failed", role=fleet.role, error=str(error))
