"""How a fleet stands, read from outside for status and metrics; nothing here changes what a fleet does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from actors.fleet import Fleet


@dataclass
class _Load:
    """What callers of a fleet know of its work and the fleet itself does not."""

    items: int = 0
    version: int | None = None


_loads: WeakKeyDictionary[Fleet, _Load] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """One moment of a fleet.

    Attributes:
        role: Whose fleet.
        wanted: Replicas that were asked for last.
        replicas: Number of replicas by state.
        items: Prompts or groups that were handed out and have not all come back.
        calls: Calls in flight over all replicas.
        version: Weights that the fleet was last brought to; None for a role whose weights stay.
    """

    role: str
    wanted: int
    replicas: Mapping[str, int] = field(default_factory=dict)
    items: int = 0
    calls: int = 0
    version: int | None = None


@contextlib.contextmanager
def handed_out(fleet: Fleet, num_items: int) -> Iterator[None]:
    """Counts items as in flight for the length of a block."""
    load = _loads.setdefault(fleet, _Load())
    load.items += num_items
    try:
        yield
    finally:
        load.items -= num_items


def note_version(fleet: Fleet, version: int) -> None:
    """Says which weights a fleet serves from now on."""
    _loads.setdefault(fleet, _Load()).version = version


def snapshot(fleet: Fleet) -> FleetStatus:
    """How a fleet stands now."""
    load = _loads.get(fleet, _Load())
    replicas = list(fleet._replicas)  # the fleet's own list, which this module alone may look at
    states: dict[str, int] = {}
    for replica in replicas:
        states[replica.state.value] = states.get(replica.state.value, 0) + 1
    return FleetStatus(
        role=fleet.role,
        wanted=fleet._wanted,
        replicas=states,
        items=load.items,
        calls=sum(replica.in_flight for replica in replicas),
        version=load.version,
    )
