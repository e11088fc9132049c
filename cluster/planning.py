"""``rlhf plan``: what each stage of a recipe places, and whether it fits on this machine or a given cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import RunConfig, Stage, roles_of
from cluster.doctor import list_gpus
from cluster.topology import NodeCapacity, RolePlan, assign
from rlhf.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from cluster.plan.devices import Device
    from cluster.plan.fitting import StageLoads
    from cluster.plan.stage_memory import Shapes
    from cluster.plan.target import PlanOptions, Target


def local_node() -> NodeCapacity:
    """This machine's cores and GPUs, without importing torch or starting Ray."""
    return NodeCapacity("this machine", float(os.cpu_count() or 1), float(_count_gpus()))


def _count_gpus() -> int:
    """The GPUs that a private cluster will offer: those of the machine that this process may see."""
    known = Path("/proc/driver/nvidia/gpus")
    found = len(list(known.glob("*"))) if known.is_dir() else len(list_gpus())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]))


def private_node(config: RunConfig) -> NodeCapacity:
    """What a private cluster of this recipe has: this machine, with the CPUs that ``ray.num_cpus`` says."""
    node = local_node()
    return node if config.ray.num_cpus is None else NodeCapacity(node.name, config.ray.num_cpus, node.gpus)


def stage_plans(config: RunConfig, stage: Stage) -> list[RolePlan]:
    """The bundles that one stage places, by role."""
    return [config.plan(role) for role in sorted(roles_of(config, stage))]


def check_placement(config: RunConfig, stages: Sequence[Stage], nodes: Sequence[NodeCapacity]) -> dict[str, int]:
    """Checks by arithmetic that every stage fits; fleets that a stage does not use make room for it.

    The recorder stays from the first stage that needs it to the end, as it owns what roles put into the object store.

    Returns:
        Actors that are placed at the same time, by stage.

    Raises:
        PlacementError: A stage does not fit; names stage and role.
    """
    placed: dict[str, int] = {}
    for stage, plans in _held_plans(config, stages):
        try:
            assign(plans, nodes)
        except PlacementError as error:
            raise PlacementError(
                f"stage {stage.name}, {error.where}", found=error.found, needed=error.needed, action=error.action
            ) from None
        placed[stage.name] = sum(plan.count for plan in plans)
    return placed


def check_free(config: RunConfig, stages: Sequence[Stage], free: NodeCapacity) -> None:
    """Checks by arithmetic that what others leave free of a cluster is enough for every stage, wherever it lies.

    Raises:
        PlacementError: The cluster is busy; names the stage.
    """
    for stage, plans in _held_plans(config, stages):
        cpus = sum(plan.count * plan.cpus for plan in plans)
        gpus = sum(plan.count * plan.gpus for plan in plans)
        if cpus > free.cpus + 1e-9 or gpus > free.gpus + 1e-9:
            raise PlacementError(
                f"stage {stage.name}",
                found=f"{free.cpus:g} CPUs and {free.gpus:g} GPUs free in the whole cluster; others use the rest",
                needed=f"{cpus:g} CPUs and {gpus:g} GPUs",
                action="Wait until others are done (`ray status`), lower what the roles take, or add nodes.",
            )


def _held_plans(config: RunConfig, stages: Sequence[Stage]) -> Iterator[tuple[Stage, list[RolePlan]]]:
    """The bundles that are placed while each stage runs; the recorder stays from the first stage that needs it."""
    recorder: set[str] = set()
    for stage in stages:
        roles = roles_of(config, stage)
        recorder |= roles & {"recorder"}
        yield stage, [config.plan(role) for role in sorted(roles | recorder)]


def check_devices(config: RunConfig, stages: Sequence[Stage]) -> None:
    """Checks by arithmetic that stages fit into the memory of this machine's GPUs, where their models are at hand.

    What does not fit only by the bounds of activations and buffers is a warning on standard error.

    Raises:
        PlacementError: Weights, optimizer state and caches alone have no room; names stage, roles and a change.
    """
    from cluster.plan.devices import local_device
    from cluster.plan.fitting import check_memory
    from cluster.plan.stage_memory import shapes_of
    from cluster.plan.target import Target

    used = set().union(*(roles_of(config, stage) for stage in stages))
    device = local_device() if any(config.resources(role).gpus for role in used) else None
    if device is None:
        return
    try:
        shapes = shapes_of(config)
    except ConfigError:
        return  # a model of another kind: whether it can be trained is for later checks to say
    target = Target((private_node(config),), device)
    check_memory(config, stages, shapes, target, only_resident=True)
    try:
        check_memory(config, stages, shapes, target)
    except PlacementError as error:
        print(f"warning: this may not fit: {error}", file=sys.stderr)


def print_plan(config: RunConfig, options: PlanOptions | None = None) -> int:
    """Prints roles, stages, memory, time and cost and returns 0.

    Args:
        config: The recipe.
        options: A cluster that is not there, a price, numbers of records.

    Raises:
        PlacementError: Something does not fit (exit code 3); says what would.
    """
    from cluster.plan.target import PlanOptions, Target

    options = options or PlanOptions()
    print(f"{config.name}: model {config.model}, run directory {config.directory}")
    print(f"\n{'role':<12}{'actors':>7}{'CPUs each':>11}{'GPUs each':>11}{'threads':>9}  strategy")
    for role in sorted(set().union(*(roles_of(config, stage) for stage in config.stages))):
        plan, threads = config.plan(role), config.resources(role).threads
        print(
            f"{plan.role:<12}{plan.count:>7}{plan.cpus:>11g}{plan.gpus:>11g}"
            f"{threads if threads else 'all':>9}  {plan.strategy}"
        )
    print("\nstages, and what each holds at the same time")
    for stage in config.stages:
        print(f"  {stage.name:<14}{stage.kind:<12}{', '.join(sorted(roles_of(config, stage)))}")
    if options.target is not None:
        target = options.target
    elif config.ray.address is not None:
        print(f"\nThe cluster at {config.ray.address} is checked when the run starts; describe it with --nodes,")
        print("--gpus-per-node and --gpu to have memory and time held against it now.")
        target = Target((), None)
    else:
        from cluster.plan.devices import host_memory_gib, local_device

        target = Target((private_node(config),), local_device(), host_memory_gib())
    if target.nodes:
        placed = check_placement(config, config.stages, target.nodes)
        node, more = target.nodes[0], f"{len(target.nodes)} nodes" if len(target.nodes) > 1 else target.nodes[0].name
        each = "each " if len(target.nodes) > 1 else ""
        print(
            f"\nfits: at most {max(placed.values())} actors at a time on {more} "
            f"({each}{node.cpus:g} CPUs, {node.gpus:g} GPUs)"
        )
    _print_memory(config, options, target)
    return 0


def _print_memory(config: RunConfig, options: PlanOptions, target: Target) -> None:
    """Memory, time and cost, as far as the models are at hand."""
    from cluster.plan import report
    from cluster.plan.devices import DEFAULT
    from cluster.plan.fitting import check_memory
    from cluster.plan.stage_memory import shapes_of

    try:
        shapes = shapes_of(config, options.shapes)
    except ConfigError as error:
        print(f"\nmemory is not planned: {error}")
        return
    for reference in shapes.missing:
        print(f"\nmodel {reference} is not at hand: its roles are left out of what follows")
    for reference, shape in shapes.others.items():
        if options.shapes is not None and Path(shape.source).is_relative_to(options.shapes):
            print(f"\nmodel {reference} is not at hand: its shape is read from {shape.source}")
    planned = check_memory(config, config.stages, shapes, target)
    if not any(stage.memories for stage in planned):
        return
    console = report.console()
    print()
    console.print(report.memory_table(planned, None if target.device is None else target.device.memory_gib))
    print(*(f"  {line}" for line in (*report.LEGEND, *report.notes(planned))), sep="\n")
    lines = report.host_lines(planned, target.host_gib)
    if lines:
        print("\nmemory of the fullest node beside its GPUs; each process takes some 0.5 GiB more", *lines, sep="\n")
    _print_hours(config, options, target.device or DEFAULT, planned, shapes)


def _print_hours(
    config: RunConfig, options: PlanOptions, device: Device, planned: Sequence[StageLoads], shapes: Shapes
) -> None:
    """Time and cost of the stages on GPUs."""
    from cluster.plan import hours, report

    found = {
        plan.stage.name: hours.stage_hours(config, plan.stage, shapes, plan.memories, (device, options.rows))
        for plan in planned
        if any(config.resources(role).gpus for role in plan.memories)
    }
    timed = [one for one in found.values() if one is not None]
    if timed:
        print()
        report.console().print(report.hours_table(timed, options.price))
        print(*(f"  {line}" for line in hours.assumptions(device)), sep="\n")
    for name in (name for name, one in found.items() if one is None):
        print(f"  no time for stage {name}: its data are not at hand; say how many records they have with --rows")
