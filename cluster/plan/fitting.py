"""Whether every stage fits into the memory of its devices, and if not the smallest change that does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import RunConfig, Stage, roles_of
from cluster.plan.changes import changes_for
from cluster.plan.devices import GIB
from cluster.plan.parts import RoleMemory
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


def check_memory(config: RunConfig, stages: Sequence[Stage], shapes: Shapes, target: Target) -> list[StageLoads]:
    """Checks by arithmetic that every stage fits into its devices, and into the host memory that roles on GPUs need.

    Args:
        config: The recipe.
        stages: Those to look at.
        shapes: Of its models; roles whose model is not at hand are left out.
        target: Nodes and devices; without a device nothing is refused.

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
            raise _with_changes(config, index, shapes, target, (role,), error) from None
        short = _shortfall(config, found, target)
        if short is not None:
            raise _with_changes(config, index, shapes, target, short[0], short[1])
        planned.append(found)
    return planned


def _shortfall(
    config: RunConfig, found: StageLoads, target: Target
) -> tuple[tuple[str, ...], PlacementError] | None:
    """The roles and the error of the first device, or else of the node, that is too small."""
    if target.device is None:
        return None
    most = target.device.memory_gib * GIB
    for load in sorted(found.loads, key=lambda load: -load.total):
        if load.total > most * (1 + 1e-9):
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
    if target.host_gib is not None and beside and total > target.host_gib:
        parts = ", ".join(f"{role} {size / GIB:.1f}" for role, size in found.host.items())
        return tuple(beside), PlacementError(
            f"role {', '.join(sorted(beside))}",
            found=f"{total:.1f} GiB of host memory on a node ({parts})",
            needed=f"at most {target.host_gib:.1f} GiB, what it has beside its GPUs",
            action="",
        )
    return None


def _with_changes(
    config: RunConfig, index: int, shapes: Shapes, target: Target, roles: Sequence[str], error: PlacementError
) -> PlacementError:
    """The error with the changes that would mend it, each tried."""
    found = [" ".join(change) for change in _mending(config, index, shapes, target, roles)]
    action = f"Set {'; or '.join(found)}." if found else error.action or "None of the usual changes is enough: use "
    if not found and not error.action:
        action += "a smaller model, more GPUs, or larger ones."
    stage = config.stages[index].name
    return PlacementError(f"stage {stage}, {error.where}", found=error.found, needed=error.needed, action=action)


def _mending(
    config: RunConfig, index: int, shapes: Shapes, target: Target, roles: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """The first few changes after which the stage fits, one of each kind."""
    kinds: set[str] = set()
    for kind, change in changes_for(config, index, roles, int(sum(node.gpus for node in target.nodes))):
        if kind in kinds or len(kinds) == MOST_CHANGES:
            continue
        if _fits_with(config, index, shapes, target, change):
            kinds.add(kind)
            yield change


def _fits_with(config: RunConfig, index: int, shapes: Shapes, target: Target, change: Sequence[str]) -> bool:
    try:
        document = apply_overrides(config.model_dump(mode="json"), change)
        changed = validate(RunConfig, document, "a changed recipe")
        stage = changed.stages[index]
        assign([changed.plan(role) for role in sorted(roles_of(changed, stage))], target.nodes)
        return _shortfall(changed, plan_stage(changed, index, shapes, target), target) is None
    except (ConfigError, PlacementError):
        return False
