"""How a fleet stands, read from outside for status and metrics; nothing here changes what a fleet does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from actors.fleet import Fleet

_versions: WeakKeyDictionary[Fleet, int] = WeakKeyDictionary()
"""What those who bring weights to a fleet know, and the fleet itself does not."""


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """One moment of a fleet.

    Attributes:
        role: Whose fleet.
        wanted: Replicas that were asked for last.
        replicas: Number of replicas by state.
        items: Prompts or groups that were asked for and have not come back.
        calls: Calls in flight over all replicas.
        version: Weights that the fleet was last brought to; None for a role whose weights stay.
    """

    role: str
    wanted: int
    replicas: Mapping[str, int] = field(default_factory=dict)
    items: int = 0
    calls: int = 0
    version: int | None = None


def note_version(fleet: Fleet, version: int) -> None:
    """Says which weights a fleet serves from now on."""
    _versions[fleet] = version


def snapshot(fleet: Fleet) -> FleetStatus:
    """How a fleet stands now."""
    return FleetStatus(
        role=fleet.role,
        wanted=fleet.wanted,
        replicas=dict(fleet.states),
        items=fleet.backlog,
        calls=sum(replica.in_flight for replica in fleet.present),
        version=_versions.get(fleet),
    )
