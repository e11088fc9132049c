"""What a role's memory is made of: named parts, and when each of them is on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.plan.devices import GIB

Kind = Literal["weights", "state", "kv_cache", "work", "publish", "process", "host"]
"""``weights``, ``state`` and ``kv_cache`` stay from call to call, and are what roles that share a GPU put aside (see
``actors.parts``). ``work`` is there while the role computes, ``publish`` while weights go from learner to engines,
``process`` as long as the process lives. ``host`` never is on the device."""

RESIDENT: frozenset[Kind] = frozenset({"weights", "state", "kv_cache", "process"})
"""What a role that nobody moves keeps on its device all the time."""
PROCESS: frozenset[Kind] = frozenset({"process"})
"""What stays of a role that has put everything aside."""

CONTEXT_GIB = 0.6
"""CUDA's own memory of a process, with the workspaces of its libraries. An assumption: it differs by driver."""
COLLECTIVE_GIB = 0.7
"""NCCL's buffers of a process that talks to others. An assumption."""
FRAGMENTATION = 0.05
"""Share that PyTorch's allocator keeps in pieces that nothing fits in. An assumption."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of one actor, on one of its devices.

    Attributes:
        name: Column of the table.
        kind: When it is there.
        size: Bytes.
    """

    name: str
    kind: Kind
    size: float


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """What one actor of a role holds, on each of its devices.

    Attributes:
        role: Section of the role.
        parts: All of them.
        note: What else the reader wants to know, for example how many sequences fit a cache.
    """

    role: str
    parts: tuple[Part, ...]
    note: str = ""

    def on_device(self, kinds: frozenset[Kind]) -> list[Part]:
        """The parts of these kinds."""
        return [part for part in self.parts if part.kind in kinds]

    def size(self, kinds: frozenset[Kind]) -> float:
        """Bytes of the parts of these kinds."""
        return sum(part.size for part in self.on_device(kinds))


def process_parts(parts: Sequence[Part], *, talks: bool) -> tuple[Part, ...]:
    """What a process needs on a GPU beside its tensors: CUDA, collectives, and what its allocator cannot use."""
    own = GIB * (CONTEXT_GIB + COLLECTIVE_GIB * talks)
    pieces = FRAGMENTATION * sum(part.size for part in parts if part.kind not in ("host", "publish"))
    return Part("process", "process", own), Part("process", "work", pieces)
