"""Where a run is to go: this machine, or a cluster that is not there yet."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from cluster.plan.devices import CATALOGUE, DEFAULT, Device
from cluster.topology import NodeCapacity
from rlhf.errors import ConfigError

CPUS_PER_GPU = 8
"""Cores beside each GPU of a cluster that is not there, unless ``--cpus-per-node`` says how many a node has."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the plan is held against.

    Attributes:
        nodes: Their CPUs and GPUs.
        device: The GPUs, all of one kind; None where there are none, or where their kind is not known.
        host_gib: Memory of each node, GiB; None where it is not known.
    """

    nodes: tuple[NodeCapacity, ...]
    device: Device | None
    host_gib: float | None = None


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the command line says beside the recipe.

    Attributes:
        target: A cluster that is not there; None for the recipe's own.
        price: Of a GPU for an hour, in any currency; None: no cost is shown.
        rows: Records of stages whose data file is not at hand; None: such stages get no hours.
        shapes: Folder with ``NAME/config.json`` of models that are not at hand.
    """

    target: Target | None = None
    price: float | None = None
    rows: int | None = None
    shapes: Path | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``rlhf plan``."""
    group = parser.add_argument_group("a cluster that is not there (else: this machine)")
    group.add_argument("--nodes", type=int, metavar="N", help="nodes, all alike (default 1)")
    group.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of a node (default 1)")
    group.add_argument("--gpu", choices=sorted(CATALOGUE), help=f"their kind (default {DEFAULT.name})")
    group.add_argument("--gpu-memory-gib", type=float, metavar="M", help="memory of a GPU, where it is of another kind")
    group.add_argument(
        "--cpus-per-node", type=float, metavar="C", help=f"CPUs of a node (default {CPUS_PER_GPU} a GPU)"
    )
    group.add_argument("--host-memory-gib", type=float, metavar="H", help="memory of a node beside its GPUs")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="P", help="shows cost, in the price's currency")
    parser.add_argument("--rows", type=int, metavar="R", help="records of a data file that is not at hand")


def options_of(arguments: argparse.Namespace) -> PlanOptions:
    """Reads the options of ``add_options``.

    Raises:
        ConfigError: A number that is not above 0.
    """
    names = (
        "nodes",
        "gpus_per_node",
        "gpu_memory_gib",
        "cpus_per_node",
        "host_memory_gib",
        "price_per_gpu_hour",
        "rows",
    )
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, found=f"{value:g}", needed="a number above 0", action="Mend the option.")
    described = ("nodes", "gpus_per_node", "gpu", "gpu_memory_gib", "cpus_per_node", "host_memory_gib")
    asked = any(getattr(arguments, name) is not None for name in described)
    return PlanOptions(
        _described(arguments) if asked else None,
        arguments.price_per_gpu_hour,
        arguments.rows,
        arguments.config.resolve().parent / "shapes",
    )


def _described(arguments: argparse.Namespace) -> Target:
    gpus = arguments.gpus_per_node or 1
    cpus = arguments.cpus_per_node or float(CPUS_PER_GPU * gpus)
    device = CATALOGUE[arguments.gpu] if arguments.gpu else DEFAULT
    if arguments.gpu_memory_gib is not None:
        name = f"{arguments.gpu_memory_gib:g} GiB GPU"
        device = Device(name, arguments.gpu_memory_gib, device.peak_tflops, device.bandwidth_gbs)
    nodes = tuple(NodeCapacity(f"node {i}", cpus, float(gpus)) for i in range(arguments.nodes or 1))
    return Target(nodes, device, arguments.host_memory_gib)
