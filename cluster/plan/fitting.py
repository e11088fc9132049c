"""Whether every stage fits into the memory of its devices, and if not the smallest change that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.config import RunConfig, Stage, roles_of
from cluster.plan.changes import changes_for
from cluster.plan.devices import GIB
from cluster.plan.parts import RESIDENT, RoleMemory
from cluster.plan.stage_memory import (
    STAYING,
    DeviceLoad,
    Shapes,
    device_loads,
    engine_starts,
    host_bytes,
    stage_memories,
)
from cluster.plan.target import Target
from cluster.topology import assign, fits
from rlhf.config import apply_overrides, validate
from rlhf.errors import ConfigError, PlacementError

MOST_CHANGES = 3
"""Changes that an error names."""


@dataclass(frozen=True, slots=True)
class StageLoads:
    """One stage against its devices.

    Attributes:
        stage: The stage.
        memories: What one actor of each role holds.
        loads: What its devices hold, phase by phase.
        host: Bytes of the fullest node beside its GPUs, by role.
    """

    stage: Stage
    memories: Mapping[str, RoleMemory]
    loads: tuple[DeviceLoad, ...]
    host: Mapping[str, float]


def plan_stage(config: RunConfig, index: int, shapes: Shapes, target: Target) -> StageLoads:
    """What one stage of a recipe holds.

    Raises:
        PlacementError: An engine's cache has no room for one sequence.
    """
    stage = config.stages[index]
    gib = None if target.device is None else target.device.memory_gib
    memories = stage_memories(config, stage, shapes, gib)
    staying: dict[str, RoleMemory] = {}
    for before in config.stages[:index]:
        left = (roles_of(config, before) & STAYING) - memories.keys()
        staying |= {r: m for r, m in stage_memories(config, before, shapes, gib).items() if r in left}
    loads = device_loads(config, stage, memories, staying)
    if gib is not None:
        loads += engine_starts(config, stage, memories, gib * GIB)
    host = _fullest_host(config, stage, {**memories, **staying}, target)
    return StageLoads(stage, memories, tuple(loads), host)


def _fullest_host(
    config: RunConfig, stage: Stage, memories: Mapping[str, RoleMemory], target: Target
) -> dict[str, float]:
    plans = [config.plan(role) for role in sorted(roles_of(config, stage))]
    if not fits(plans, target.nodes):
        return host_bytes(config, memories, {plan.role: plan.count for plan in plans})
    placed = assign(plans, target.nodes)
    beside = {role: 1 for role in memories if role not in placed}  # fleets that stay, wherever they are
    loads = [
        host_bytes(config, memories, beside | {role: names.count(node.name) for role, names in placed.items()})
        for node in target.nodes
    ]
    return max(loads, key=lambda load: sum(load.values()), default={})


def check_memory(
    config: RunConfig, stages: Sequence[Stage], shapes: Shapes, target: Target, *, only_resident: bool = False
) -> list[StageLoads]:
    """Checks by arithmetic that every stage fits into its devices, and into the host memory that roles on GPUs need.

    Args:
        config: The recipe.
        stages: Those to look at.
        shapes: Of its models; roles whose model is not at hand are left out.
        target: Nodes and devices; without a device nothing is refused.
        only_resident: Whether to leave out what comes and goes, which is an upper bound: weights, optimizer state and
            caches alone are certain.

    Returns:
        What the stages hold.

    Raises:
        PlacementError: A stage does not fit; names stage, roles, what is missing, and changes that have been found to
            fit, the smallest first.
    """
    planned = []
    for index, stage in enumerate(config.stages):
        if stage not in stages:
            continue
        try:
            found = plan_stage(config, index, shapes, target)
        except PlacementError as error:
            role = error.where.removeprefix("role ")
            raise _with_changes(config, index, shapes, target, ((role,), error)) from None
        short = _shortfall(config, found, target, only_resident)
        if short is not None:
            raise _with_changes(config, index, shapes, target, short)
        planned.append(found)
    return planned


def _shortfall(
    config: RunConfig,
    found: StageLoads,
    target: Target,
    only_resident: bool = False,
    only: tuple[str, ...] | None = None,
) -> tuple[tuple[str, ...], PlacementError] | None:
    """The roles and the error of the first device, or else of the node, that is too small; ``only`` of some roles."""
    if target.device is None:
        return None
    most = target.device.memory_gib * GIB
    loads = [load for load in found.loads if only is None or set(only) & set(load.roles)]
    for load in sorted(loads, key=lambda load: -load.total):
        resident = sum(part.size for _, part in load.parts if part.kind in RESIDENT)
        if (resident if only_resident else load.total) > most * (1 + 1e-9):
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in load.sums().items() if size > 0.05 * GIB)
            turn = "" if load.phase == "work" else f", phase {load.phase}"
            names = ", ".join(sorted(set(load.roles)))
            return load.roles, PlacementError(
                f"role {names}{turn}",
                found=f"{load.total / GIB:.1f} GiB on a device ({parts})",
                needed=f"at most {target.device.memory_gib:g} GiB, what {target.device.name} has",
                action="",
            )
    beside = {role: size for role, size in found.host.items() if config.resources(role).gpus > 0}
    total = sum(found.host.values()) / GIB
    if target.host_gib is not None and beside and total > target.host_gib and not only_resident:
        parts = ", ".join(f"{role} {size / GIB:.1f}" for role, size in found.host.items())
        return tuple(beside), PlacementError(
            f"role {', '.join(sorted(beside))}",
            found=f"{total:.1f} GiB of host memory on a node ({parts})",
            needed=f"at most {target.host_gib:.1f} GiB, what it has beside its GPUs",
            action="",
        )
    return None


def _with_changes(
    config: RunConfig, index: int, shapes: Shapes, target: Target, short: tuple[tuple[str, ...], PlacementError]
) -> PlacementError:
    """The error with the changes that would mend it, each tried; for the whole stage, or else for those roles."""
    roles, error = short
    gpus = int(sum(node.gpus for node in target.nodes))
    found: list[tuple[str, ...]] = []
    for only in (None, roles):
        found = found or list(
            _mending(config, index, roles, partial(_fits, index=index, shapes=shapes, target=target, only=only), gpus)
        )
    action = f"Set {'; or '.join(' '.join(change) for change in found)}." if found else error.action
    stage = config.stages[index].name
    return PlacementError(
        f"stage {stage}, {error.where}",
        found=error.found,
        needed=error.needed,
        action=action or "None of the usual changes is enough: use a smaller model, more GPUs, or larger ones.",
    )


def _mending(
    config: RunConfig, index: int, roles: Sequence[str], fits_now: Callable[[RunConfig], bool], num_gpus: int
) -> Iterator[tuple[str, ...]]:
    """The first few changes after which ``fits_now`` says yes, one of each kind."""
    kinds: set[str] = set()
    for kind, change in changes_for(config, index, roles, num_gpus):
        if kind in kinds or len(kinds) == MOST_CHANGES:
            continue
        try:
            changed = validate(RunConfig, apply_overrides(config.model_dump(mode="json"), change), "a changed recipe")
            if not fits_now(changed):
                continue
        except (ConfigError, PlacementError):
            continue
        kinds.add(kind)
        yield change


def _fits(config: RunConfig, index: int, shapes: Shapes, target: Target, only: tuple[str, ...] | None) -> bool:
    """Whether a stage fits, or at least some of its roles."""
    stage = config.stages[index]
    assign([config.plan(role) for role in sorted(roles_of(config, stage))], target.nodes)
    short = _shortfall(config, plan_stage(config, index, shapes, target), target, only=only)
    return short is None
