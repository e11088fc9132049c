"""Topology: roles -> bundles, and the arithmetic that says whether they fit, before Ray is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, field_validator

from cluster.labels import check_selector, matches, told
from rlhf.config import StrictModel
from rlhf.errors import PlacementError

SMALL_ROLES = ("recorder", "evaluator", "rules")
"""Roles of one actor each that share one section of the recipe, ``recorder``."""

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class Resources(StrictModel):
    """What one actor of a role takes, and how a role's actors are laid over nodes."""

    cpus: float = Field(default=0.25, ge=0)
    """Ray's CPU share of one actor: what placement counts. Not the number of threads it computes with."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of one actor: a whole number, or a fraction below 1, which shares a device."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of one actor on a CPU; unset: every core of its node."""
    strategy: Strategy = "PACK"
    """Ray's placement strategy for the role's bundles."""
    labels: dict[str, str] = {}
    """Labels that a node must have to take the role's actors, for example ``ray.io/market-type: spot``. Beside a value:
    ``!value``, ``in(a, b)``, ``!in(a, b)``. Nodes get them from ``ray start --labels`` or from KubeRay."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for placement and for a start, model loading included."""
    call_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one call."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts within ``restart_window_s``. A fleet replaces so many dead replicas for each that it has; then it goes
    on with those that are left, and the run ends when none is. The recorder is started again so many times, and a gang
    of learners so many times without a newer checkpoint in between; then the run ends."""
    restart_window_s: float = Field(default=3600.0, gt=0)
    """Seconds after which the replacement of a dead replica, or a restart of the recorder, no longer counts."""

    probe_every_s: float = Field(default=10.0, gt=0)
    """Seconds between two probes of an actor; a start is not probed."""
    probe_timeout_s: float = Field(default=30.0, gt=0)
    """When a probe is overdue. The actor then gets no more work until it answers; after a second overdue probe it is
    ended and replaced."""
    stall_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time in which the work of an actor that answers makes no progress: no token, batch or verdict. Then
    everybody's stacks are written to ``RUN/stacks`` and the actor is ended and replaced."""

    @field_validator("labels")
    @classmethod
    def _is_selector(cls, labels: dict[str, str]) -> dict[str, str]:
        check_selector(labels)
        return labels

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, gpus: float) -> float:
        if gpus > 1.0 and gpus != int(gpus):
            raise ValueError("a whole number of GPUs, or a fraction below 1")
        return gpus


@dataclass(frozen=True, slots=True)
class RolePlan:
    """``count`` actors of ``role``, each taking ``cpus`` and ``gpus`` of one node that has ``labels``."""

    role: str
    count: int
    cpus: float
    gpus: float
    strategy: Strategy
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """CPUs and GPUs that one node, or a whole cluster, offers; a node has labels, too."""

    name: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)


def assign(plans: Sequence[RolePlan], nodes: Sequence[NodeCapacity]) -> dict[str, list[str]]:
    """Lays every actor on a node: largest bundles first, each on the fullest node that still takes it.

    Returns:
        Node names by role, one per actor.

    Raises:
        PlacementError: Something does not fit; says which role, what it needs and the largest node that is left.
    """
    free = {node.name: [node.cpus, node.gpus] for node in nodes}
    labels = {node.name: node.labels for node in nodes}
    placed: dict[str, list[str]] = {}
    for plan in sorted(plans, key=lambda p: (-p.gpus * _together(p), -p.cpus * _together(p), p.role)):
        used = placed.setdefault(plan.role, [])
        allowed = {name: left for name, left in free.items() if matches(plan.labels, labels[name])}
        if plan.count and nodes and not allowed:
            raise _no_such_node(plan, nodes)
        for _ in range(plan.count):
            fits = _fitting(plan, used, allowed)
            if not fits:
                raise _shortfall(plan, len(used), allowed)
            spread = plan.strategy in ("SPREAD", "STRICT_SPREAD")
            chosen = min(fits, key=lambda n: (used.count(n) if spread else 0, free[n][1], free[n][0], n))
            free[chosen][0] -= plan.cpus
            free[chosen][1] -= plan.gpus
            used.append(chosen)
    return placed


def fits(plans: Sequence[RolePlan], nodes: Sequence[NodeCapacity]) -> bool:
    """Whether ``assign`` finds a place for every actor."""
    try:
        assign(plans, nodes)
    except PlacementError:
        return False
    return True


def _together(plan: RolePlan) -> int:
    """Actors that have to share one node."""
    return plan.count if plan.strategy == "STRICT_PACK" else 1


def _fitting(plan: RolePlan, used: Sequence[str], free: Mapping[str, Sequence[float]]) -> list[str]:
    """The nodes that can take the next actor, after those in ``used``."""
    if plan.strategy == "STRICT_PACK" and used:
        return [used[0]]  # chosen with room for all
    num = _together(plan)
    fits = [n for n, (c, g) in free.items() if c + 1e-9 >= plan.cpus * num and g + 1e-9 >= plan.gpus * num]
    return [name for name in fits if plan.strategy != "STRICT_SPREAD" or name not in used]


def _no_such_node(plan: RolePlan, nodes: Sequence[NodeCapacity]) -> PlacementError:
    """The first label for which no node has a value that will do, or all of them where no node has them together."""
    alone = [{key: condition} for key, condition in plan.labels.items()]
    lacking = next((one for one in alone if not any(matches(one, node.labels) for node in nodes)), plan.labels)
    values = {key: sorted({node.labels[key] for node in nodes if key in node.labels}) for key in lacking}
    there = ", ".join(f"{key}: {' '.join(found) if found else 'none'}" for key, found in values.items())
    return PlacementError(
        f"role {plan.role}",
        found=f"no node labelled {told(lacking)} among {len(nodes)} (values there: {there})",
        needed=f"nodes labelled {told(plan.labels)}",
        action=f"Label nodes (`ray start --labels`, KubeRay's worker groups), or change {_section(plan)}.labels.",
    )


def _section(plan: RolePlan) -> str:
    return "recorder" if plan.role in SMALL_ROLES else f"roles.{plan.role}.resources"


def _shortfall(plan: RolePlan, placed: int, free: Mapping[str, Sequence[float]]) -> PlacementError:
    num = _together(plan)
    cpus, gpus = max(free.values(), key=lambda left: (left[1], left[0]) if plan.gpus else left[0], default=(0.0, 0.0))
    needed = f"{plan.cpus * num:g} CPUs" + (f" and {plan.gpus * num:g} GPUs" if plan.gpus else "")
    most = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if plan.gpus else "")
    needed += " on one node for " + (f"all {plan.count} actors" if num > 1 else "each actor")
    needed += " on a node of its own" if plan.strategy == "STRICT_SPREAD" else ""
    needed += f" labelled {told(plan.labels)}" if plan.labels else ""
    action = f"Lower what one actor takes ({_section(plan)}.cpus, .gpus)"
    if placed:
        option = "ranks" if plan.role in ("learner", "critic") else "replicas"
        action = f"Set {_section(plan).removesuffix('.resources')}.{option}={placed}"
    return PlacementError(
        f"role {plan.role}",
        found=f"room for {placed} of {plan.count} actors; the largest free node has {most}",
        needed=f"{needed} ({plan.strategy})",
        action=f"{action}, or add nodes.",
    )
