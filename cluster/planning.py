"""``rlhf plan``: what each stage of a recipe places, and whether it fits on this machine or a given cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.config import RunConfig, Stage, roles_of
from cluster.doctor import list_gpus
from cluster.topology import NodeCapacity, RolePlan, assign
from rlhf.errors import PlacementError


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


def print_plan(config: RunConfig) -> int:
    """Prints roles, bundles and stages and returns 0; raises ``PlacementError`` (exit code 3) where they do not fit."""
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
    if config.ray.address is not None:
        print(f"\nThe cluster at {config.ray.address} is checked when the run starts.")
        return 0
    node = private_node(config)
    placed = check_placement(config, config.stages, [node])
    print(
        f"\nfits: at most {max(placed.values())} actors at a time on {node.name} "
        f"({node.cpus:g} CPUs, {node.gpus:g} GPUs)"
    )
    return 0
