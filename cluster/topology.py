"""Topology: roles -> bundles, and the arithmetic that says whether they fit, before Ray is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.errors import PlacementError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class Resources(StrictModel):
    """What one actor of a role takes, and how a role's actors are laid over nodes."""

    cpus: float = Field(default=0.25, ge=0)
    """Ray's CPU share of one actor: what placement counts. Not the number of threads it computes with."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of one actor; a fraction shares a device."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of one actor on a CPU; unset: every core of its node."""
    strategy: Strategy = "PACK"
    """Ray's placement strategy for the role's bundles."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for placement and for a start, model loading included."""
    call_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one call."""
    max_restarts: int = Field(default=3, ge=0)
    """Dead replicas that are replaced before the run is given up."""


@dataclass(frozen=True, slots=True)
class RolePlan:
    """``count`` actors of ``role``, each taking ``cpus`` and ``gpus`` of one node."""

    role: str
    count: int
    cpus: float
    gpus: float
    strategy: Strategy


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What one node has free."""

    name: str
    cpus: float
    gpus: float


def assign(plans: Sequence[RolePlan], nodes: Sequence[NodeCapacity]) -> dict[str, list[str]]:
    """Lays every actor on a node: largest bundles first, each on the fullest node that still takes it.

    Returns:
        Node names by role, one per actor.

    Raises:
        PlacementError: Something does not fit; says which role, what it needs and the largest node that is left.
    """
    free = {node.name: [node.cpus, node.gpus] for node in nodes}
    placed: dict[str, list[str]] = {}
    for plan in sorted(plans, key=lambda p: (-p.gpus, -p.cpus, p.role)):
        for index in range(plan.count):
            fits = [n for n, (c, g) in free.items() if c + 1e-9 >= plan.cpus and g + 1e-9 >= plan.gpus]
            used = placed.setdefault(plan.role, [])
            if plan.strategy == "STRICT_SPREAD":
                fits = [name for name in fits if name not in used]
            if plan.strategy == "STRICT_PACK" and used:
                fits = [name for name in fits if name == used[0]]
            if not fits:
                raise _shortfall(plan, index, free)
            spread = plan.strategy in ("SPREAD", "STRICT_SPREAD")
            chosen = min(fits, key=lambda n: (used.count(n) if spread else 0, free[n][1], free[n][0], n))
            free[chosen][0] -= plan.cpus
            free[chosen][1] -= plan.gpus
            used.append(chosen)
    return placed


def _shortfall(plan: RolePlan, placed: int, free: Mapping[str, Sequence[float]]) -> PlacementError:
    cpus = max((c for c, _ in free.values()), default=0.0)
    gpus = max((g for _, g in free.values()), default=0.0)
    kind, need, most = ("GPUs", plan.gpus, gpus) if plan.gpus > gpus + 1e-9 else ("CPUs", plan.cpus, cpus)
    option = "ranks" if plan.role in ("learner", "critic") else "replicas"
    return PlacementError(
        f"role {plan.role}",
        found=f"room for {placed} of {plan.count} actors; the largest free node has {most:g} {kind}",
        needed=f"{need:g} {kind} on one node for each actor ({plan.strategy})",
        action=f"Set roles.{plan.role}.{option}={max(placed, 1)}, lower roles.{plan.role}.resources, or add nodes.",
    )
