"""``rlhf plan``: what a recipe would place, and whether it fits on this machine or a given one."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.config import RunConfig, roles_of
from cluster.topology import NodeCapacity, assign


def local_node() -> NodeCapacity:
    """This machine's cores and GPUs, without importing torch or starting Ray."""
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return NodeCapacity("this machine", float(os.cpu_count() or 1), float(gpus))


def print_plan(config: RunConfig) -> int:
    """Prints roles, bundles and stages and returns 0; raises ``PlacementError`` (exit code 3) where they do not fit."""
    node = local_node()
    if config.ray.address is None and config.ray.num_cpus is not None:
        node = NodeCapacity(node.name, config.ray.num_cpus, node.gpus)
    print(f"{config.name}: model {config.model}, run directory {config.directory}")
    print(f"\n{'role':<12}{'actors':>7}{'CPUs each':>11}{'GPUs each':>11}{'threads':>9}  strategy")
    for plan in config.plans():
        threads = config.resources(plan.role).threads
        print(
            f"{plan.role:<12}{plan.count:>7}{plan.cpus:>11g}{plan.gpus:>11g}"
            f"{threads if threads else 'all':>9}  {plan.strategy}"
        )
    print("\nstages")
    for stage in config.stages:
        print(f"  {stage.name:<14}{stage.kind:<12}{', '.join(sorted(roles_of(config, stage))) or 'no roles'}")
    if config.ray.address is not None:
        print(f"\nThe cluster at {config.ray.address} is checked when the run starts.")
        return 0
    placed = assign(config.plans(), [node])
    num_actors = sum(len(nodes) for nodes in placed.values())
    print(f"\nfits: {num_actors} actors on {node.name} ({node.cpus:g} CPUs, {node.gpus:g} GPUs)")
    return 0
