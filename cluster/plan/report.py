"""The plan as tables: memory by stage and device, host memory, time and cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from cluster.plan.devices import GIB
from cluster.plan.fitting import StageLoads
from cluster.plan.hours import StageHours
from cluster.plan.parts import RoleMemory
from cluster.plan.stage_memory import DeviceLoad

COLUMNS = {
    "weights": ("weights", "reference"),
    "Adam": ("optimizer",),
    "grads": ("gradients",),
    "KV cache": ("KV cache",),
    "forward": ("activations",),
    "backward": ("backward",),
    "buffers": ("buffers", "bucket"),
    "process": ("process",),
}
"""Columns of the table, and the parts in each."""
LEGEND = (
    "Adam: fp32 weights and both means. forward: what a forward pass leaves or needs. backward: logits and their",
    "gradients, or those of a layer. buffers: DeepSpeed's, and a bucket of weights on its way to the engines.",
)
WIDTH = 118
"""Of tables where the output is no terminal."""


def console() -> Console:
    """Where tables go: as wide as the terminal, or ``WIDTH``."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def memory_table(planned: Sequence[StageLoads], device_gib: float | None) -> Table:
    """GiB on one device of each kind, in the phase in which it holds most."""
    of = "" if device_gib is None else f" of {device_gib:g}"
    table = _table(f"memory of one device, GiB{of}")
    for name in ("stage", "roles", "phase"):
        table.add_column(name, overflow="fold", min_width=20 if name == "roles" else None)
    for name in (*COLUMNS, "total"):
        table.add_column(name, justify="right")
    for stage in planned:
        for load in fullest(stage.loads):
            sums = load.sums()
            cells = [_gib(sum(sums.get(part, 0.0) for part in parts)) for parts in COLUMNS.values()]
            table.add_row(load.stage, ", ".join(sorted(set(load.roles))), load.phase, *cells, _gib(load.total))
        for role, memory in on_cpus(stage).items():
            sums = {name: sum(p.size for p in memory.parts if p.name in parts) for name, parts in COLUMNS.items()}
            total = sum(sums.values())
            table.add_row(stage.stage.name, role, "on CPU", *(_gib(size) for size in sums.values()), _gib(total))
    return table


def fullest(loads: Sequence[DeviceLoad]) -> list[DeviceLoad]:
    """Of each device the phase that holds most."""
    most: dict[tuple[str, ...], DeviceLoad] = {}
    for load in loads:
        if load.is_shown and (load.roles not in most or load.total > most[load.roles].total):
            most[load.roles] = load
    return list(most.values())


def on_cpus(stage: StageLoads) -> Mapping[str, RoleMemory]:
    """The roles of a stage that lie on no device."""
    on_devices = {role for load in stage.loads for role in load.roles}
    return {role: memory for role, memory in stage.memories.items() if role not in on_devices}


def notes(planned: Sequence[StageLoads]) -> list[str]:
    """What else is worth knowing of a role, once each."""
    found = {f"{memory.role}: {memory.note}" for stage in planned for memory in stage.memories.values() if memory.note}
    return sorted(found)


def host_lines(planned: Sequence[StageLoads], host_gib: float | None) -> list[str]:
    """Host memory of the fullest node, stage by stage, and a warning where there is not as much."""
    lines = []
    for stage in planned:
        total = sum(stage.host.values()) / GIB
        if total < 0.05:
            continue
        parts = ", ".join(f"{role} {size / GIB:.1f}" for role, size in stage.host.items())
        short = host_gib is not None and total > host_gib
        warning = f"   WARNING: more than the {host_gib:.1f} GiB that it has" if short else ""
        lines.append(f"  {stage.stage.name:<14}{total:>8.1f} GiB  ({parts}){warning}")
    return lines


def hours_table(found: Sequence[StageHours], price: float | None) -> Table:
    """Tokens, hours, GPU-hours and cost by stage."""
    table = _table("time on GPUs, at most")
    names = ["stage", "tokens drawn", "tokens trained", "hours", "of which", "GPUs", "GPU-hours"]
    for name in names + (["cost"] if price is not None else []):
        table.add_column(name, justify="left" if name in ("stage", "of which") else "right", overflow="fold")
    rows = [
        (one.stage, one.drawn, one.trained, one.hours, _shares(one.by_role), one.gpus, one.gpu_hours) for one in found
    ]
    total = sum(one.gpu_hours for one in found)
    if len(found) > 1:
        rows.append(("all", 0.0, 0.0, sum(one.hours for one in found), "", 0.0, total))
    for stage, drawn, trained, hours, shares, gpus, gpu_hours in rows:
        counts = [_tokens(drawn), _tokens(trained), f"{hours:.2f}", shares, f"{gpus:g}" if gpus else ""]
        cost = [] if price is None else [f"{gpu_hours * price:,.2f}"]
        table.add_row(stage, *counts, f"{gpu_hours:,.1f}", *cost)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="none", box=None, pad_edge=False)


def _shares(by_role: Mapping[str, float]) -> str:
    total = sum(by_role.values())
    return ", ".join(f"{role} {hours / total:.0%}" for role, hours in by_role.items() if total and hours)


def _tokens(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}" if count else ""


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB else ""
