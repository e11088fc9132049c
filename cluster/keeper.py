"""The keeper: a small actor on a joined cluster that outlives its run's drivers.

It knows what the run holds there and for how long: a driver renews its lease every few seconds. When the lease runs out
the keeper ends whatever is the run's, and itself. A new driver of the same run that comes before takes the rest over;
calls of the one before it are refused from then on.

Nothing but the standard library and Ray is needed here, so that it starts at once and costs next to nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

NAMESPACE = "rlhf"
"""Of every named actor and placement group of ours."""

STOP_S = 20.0
"""What a worker gets to stop by itself before it is ended."""


@dataclass(frozen=True, slots=True)
class Holding:
    """One actor of a run.

    Attributes:
        role: Whose it is.
        index: Place in the order in which the role's actors were made; a gang's rank.
        group: Name of its placement group.
        bundle: Its bundle there.
        fingerprint: Of the worker's class, arguments, resources and code: equal for actors that can stand in for each
            other.
    """

    role: str
    index: int
    group: str
    bundle: int
    fingerprint: str


Holdings = Mapping[str, Holding]
"""By the actors' names."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a driver gets that attaches.

    Attributes:
        epoch: Number of this driver; later ones have higher numbers.
        holdings: What the driver before it held.
        silent_s: Seconds since that one renewed its lease; 0 where there was none.
    """

    epoch: int
    holdings: dict[str, Holding] = field(default_factory=dict)
    silent_s: float = 0.0


class LeaseBook:
    """Who holds the lease, until when, and what; any thread may ask.

    Args:
        timeout_s: Life of a lease that nobody has taken yet.
        clock: Seconds that only grow.
        wall_ns: The time of day, nanoseconds. Epochs come from it, so that they grow over a keeper that was restarted
            and has forgotten the last one.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._clock, self._wall_ns = clock, wall_ns
        self._lock = threading.Lock()
        self._timeout_s = timeout_s
        self._renewed = clock()
        self._epoch = 0
        self._holdings: dict[str, Holding] = {}
        self._is_over = False

    def attach(self, timeout_s: float) -> Grant | None:
        """Gives the lease to a new driver, for ``timeout_s`` from its last renewal; None where all is being ended."""
        with self._lock:
            if self._is_over:
                return None
            silent_s = self._clock() - self._renewed if self._epoch else 0.0
            self._epoch = max(self._epoch + 1, self._wall_ns())
            self._timeout_s, self._renewed = timeout_s, self._clock()
            return Grant(self._epoch, dict(self._holdings), silent_s)

    def renew(self, epoch: int, holdings: Holdings) -> bool:
        """Renews the lease and takes down what the run holds now; False for a driver that another one has followed.

        A keeper that was restarted has forgotten its driver and learns of it here.
        """
        with self._lock:
            if self._is_over or epoch < self._epoch:
                return False
            self._epoch, self._renewed, self._holdings = epoch, self._clock(), dict(holdings)
            return True

    def expire(self) -> bool:
        """Whether the lease has run out; once it has, it is given to nobody any more."""
        with self._lock:
            self._is_over = self._is_over or self._clock() - self._renewed > self._timeout_s
            return self._is_over

    @property
    def interval_s(self) -> float:
        """How often to look whether it has run out."""
        with self._lock:
            return min(1.0, self._timeout_s / 10)


class Keeper:
    """The actor; see the module.

    Args:
        name: Its own.
        prefix: What the names of the run's other actors and of its placement groups begin with.
        timeout_s: How long it waits for a driver after a restart of its own.
    """

    def __init__(self, name: str, prefix: str, timeout_s: float) -> None:
        self._name, self._prefix = name, prefix
        self._book = LeaseBook(timeout_s)
        threading.Thread(target=self._watch, name="lease-watch", daemon=True).start()

    def attach(self, timeout_s: float) -> Grant | None:
        """See ``LeaseBook.attach``."""
        return self._book.attach(timeout_s)

    def renew(self, epoch: int, holdings: Holdings) -> bool:
        """See ``LeaseBook.renew``."""
        return self._book.renew(epoch, holdings)

    def _watch(self) -> None:
        while not self._book.expire():
            time.sleep(self._book.interval_s)
        while True:
            try:
                end_named(self._prefix, keep=[self._name])
                ray.kill(ray.get_actor(self._name, NAMESPACE), no_restart=True)
            except (RayError, ValueError):  # the control store may be away for a moment
                time.sleep(1.0)


def end_named(prefix: str, keep: Collection[str] = ()) -> int:
    """Ends actors and placement groups by the beginning of their names; returns how many actors there were.

    Args:
        prefix: Beginning of the names.
        keep: Names of actors and of placement groups that stay.
    """
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    ended = end_actors([name for name in names if name.startswith(prefix) and name not in keep])
    for name in group_names(prefix):
        if name not in keep:
            remove_group(name)
    return ended


def end_actors(names: Collection[str]) -> int:
    """Ends actors by name, those that can in their own way first; returns how many were still there."""
    handles = []
    for name in names:
        with contextlib.suppress(ValueError):  # it has just ended
            handles.append(ray.get_actor(name, NAMESPACE))
    stops: list[Any] = [handle.stop.remote() for handle in handles if hasattr(handle, "stop")]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=STOP_S)
    for handle in handles:
        ray.kill(handle, no_restart=True)
    return len(handles)


def group_names(prefix: str) -> list[str]:
    """Names of the placement groups that are there or wanted, with this beginning."""
    groups = placement_group_table().values()
    return [group["name"] for group in groups if group["name"].startswith(prefix) and group["state"] != "REMOVED"]


def remove_group(name: str) -> None:
    """Removes a placement group by name, and with it what runs there; one that is gone is left alone."""
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(name))
