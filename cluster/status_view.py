"""How ``rlhf status`` looks: from what was read to what rich prints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.errors import RlhfError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.progress import clock_time
from rlhf.runs.status import Health, MemoryStatus, Reading, RoleStatus, RunStatus, StageStatus
from rlhf.runs.summary import format_summary, read_summary

COLOURS = {
    Health.COMPLETE: "green",
    Health.RUNNING: "green",
    Health.STARTING: "cyan",
    Health.SILENT: "bold red",
    Health.ENDED: "yellow",
    Health.LOST: "bold red",
    Health.NEW: "yellow",
}

_GO_ON = "Run the same command again to go on."
_HIDDEN_FIELDS = ("time", "kind", "stage", "role", "replica")
_NUM_EVENTS = 6


def render(root: Path, reading: Reading) -> RenderableType:
    """Everything that is known of a run, for a terminal."""
    parts: list[RenderableType] = [_headline(root, reading)]
    if reading.problem:
        parts.append(Text(reading.problem, style="red"))
    status = reading.status
    if reading.health is Health.COMPLETE:
        parts.append(Text(_results(root)))
    elif status is not None:
        parts += _body(status, at_work=reading.health in (Health.RUNNING, Health.SILENT))
    return Group(*parts)


def _headline(root: Path, reading: Reading) -> Text:
    line = Text.assemble((str(root), "bold"), "  ", (reading.health.value, COLOURS[reading.health]))
    line.append(f"  {_in_words(reading)}")
    return line


def _in_words(reading: Reading) -> str:
    status, age = reading.status, clock_time(reading.age_s)
    match reading.health:
        case Health.COMPLETE:
            return "every stage is complete"
        case Health.NEW:
            return f"no driver is at work, and none has said how far it came. {_GO_ON}"
        case Health.STARTING:
            return "a driver is at work and starts the cluster"
    assert status is not None, "the other states are read from it"
    driver = f"{status.host}, process {status.pid}"
    match reading.health:
        case Health.RUNNING if status.ended:
            return f"the driver is closing ({driver})"
        case Health.RUNNING:
            unseen = "" if reading.held else "; its lock is not seen from this machine"
            running = clock_time(max(0.0, status.time - status.started))
            return f"for {running} on {driver}; as of {reading.age_s:.0f} s ago{unseen}"
        case Health.SILENT:
            return (
                f"the driver holds the run and has written nothing for {age} ({driver}): it hangs, or its machine is "
                "very busy. What follows is that old."
            )
        case Health.ENDED:
            return f"the driver ended {age} ago, before the run was complete. {_GO_ON}"
    return f"the driver was killed or crashed: nothing for {age}, and no lock is held ({driver}). {_GO_ON}"


def _body(status: RunStatus, *, at_work: bool) -> Iterator[RenderableType]:
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(min_width=10)
    rows.add_column()
    rows.add_row("stages", _stages(status))
    if status.stage is not None:
        rows.add_row(Text(status.stage.name, style="bold"), _progress(status.stage, at_work=at_work))
    yield rows
    if at_work and status.roles:
        yield Text()
        yield _roles(status.roles)
    yield Text()
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(min_width=10)
    rows.add_column()
    for label, told in _numbers(status):
        rows.add_row(label, Text(told))
    rows.add_row("memory", Text(_memory(status.memory)))
    if at_work and (endpoints := status.metrics_endpoints):
        others = f" and {len(endpoints) - 1} more" if len(endpoints) > 1 else ""
        rows.add_row("metrics", Text(f"http://{endpoints[0]}/metrics{others}"))
    yield rows
    if status.events:
        yield Text()
        yield _events(status)


def _stages(status: RunStatus) -> Text:
    line = Text()
    for name, complete in status.stages.items():
        if complete:
            line.append(f"{name} done", style="green")
        elif status.stage is not None and status.stage.name == name:
            line.append(name, style="bold")
        else:
            line.append(name, style="dim")
        line.append("  ")
    return line


def _progress(stage: StageStatus, *, at_work: bool) -> RenderableType:
    row = Table.grid(padding=(0, 2, 0, 0))
    passed = f"{clock_time(stage.seconds)} passed"
    if stage.done is None or stage.total is None:
        row.add_row(passed)
        return row
    known = at_work and stage.seconds_left is not None
    left = f"about {clock_time(stage.seconds_left or 0.0)} left" if known else ""
    bar = ProgressBar(total=stage.total, completed=stage.done, width=30)
    row.add_row(bar, f"{stage.done}/{stage.total}", passed, left)
    return row


def _roles(roles: list[RoleStatus]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("role")
    table.add_column("replicas")
    for name in ("version", "items", "calls", "tokens/s", "restarts"):
        table.add_column(name, justify="right")
    for role in roles:
        table.add_row(
            role.role,
            _replicas(role),
            "" if role.version is None else str(role.version),
            str(role.items) if role.kind == "fleet" else "",
            str(role.calls),
            "" if role.tokens_per_second is None else f"{role.tokens_per_second:.0f}",
            Text(str(role.restarts), style="yellow" if role.restarts else ""),
        )
    return table


def _replicas(role: RoleStatus) -> Text:
    """``3 healthy, 1 starting``; what is wanted where that is another number."""
    states = ", ".join(f"{number} {state}" for state, number in sorted(role.replicas.items())) or "none"
    healthy = role.replicas.get("healthy", 0)
    what = "rank" if role.kind == "gang" else "replica"
    if role.replicas.keys() <= {"healthy"} and healthy == role.wanted:
        return Text(f"{healthy} {what}{'' if healthy == 1 else 's'}")
    return Text(f"{states} (of {role.wanted})", style="yellow")


def _numbers(status: RunStatus) -> Iterator[tuple[str, str]]:
    """What is told of the last step and the last validation, with what it is headed by."""
    if (step := status.step) is not None:
        found = step.metrics
        shown = {
            "score": _with_spread(found.get("rollout/score"), found.get("rollout/score_std")),
            "missing": _number(found.get("rollout/missing_scores")),
            "staleness": _number(found.get("rollout/staleness")),
            "length": _number(found.get("rollout/completion_length")),
            "published in": _seconds(found.get("publish/seconds")),
            "took": _seconds(step.seconds),
        } | _losses(found)
        told = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
        yield "last step", f"{step.stage} {step.step}: {told or 'no numbers'}"
    if (validation := status.validation) is not None:
        score = _number(validation.metrics.get("validation/score")) or "missing"
        yield "validation", f"{validation.stage} after {validation.step}: score {score}"


def _losses(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """The losses, and the updates that were skipped."""
    found = {}
    for name, value in metrics.items():
        last = name.rpartition("/")[2]
        if last in ("loss", "nll") or (last == "skipped" and value):
            found[name] = _number(value) or "not finite"
    return found


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} s"


def _with_spread(mean: float | None, std: float | None) -> str | None:
    return None if mean is None else f"{mean:.3g}" + ("" if std is None else f" (std {std:.2g})")


def _memory(memory: MemoryStatus) -> str:
    told = f"{_gib(memory.driver_machine)} on the driver's machine, {_gib(memory.driver_machine_peak)} at most"
    if memory.object_store is not None and memory.object_store_capacity is not None:
        told += f"; object store {_gib(memory.object_store)} of {_gib(memory.object_store_capacity)}"
    return told


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _events(status: RunStatus) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", expand=True)
    for name in ("time", "event", "of"):
        table.add_column(name, no_wrap=True)
    table.add_column("what", no_wrap=True, overflow="ellipsis", ratio=1)
    for event in status.events[-_NUM_EVENTS:]:
        moment = time.strftime("%H:%M:%S", time.localtime(float(event.get("time", 0.0))))
        table.add_row(moment, Text(str(event.get("kind"))), Text(_whose(event)), Text(_details(event)))
    return table


def _whose(event: Mapping[str, Any]) -> str:
    whose = str(event.get("role") or event.get("stage") or "")
    return f"{whose}[{event['replica']}]" if "replica" in event else whose


def _details(event: Mapping[str, Any]) -> str:
    told = "  ".join(f"{name}={value}" for name, value in event.items() if name not in _HIDDEN_FIELDS)
    return "".join(letter if letter.isprintable() else " " for letter in told)  # no breaks, no terminal's commands


def _results(root: Path) -> str:
    """The gist of a complete run: its summary, where that was written and can be read."""
    path = RunDirectory(root).summary
    if not path.is_file():
        return f"{path} is still to be written. Run the same command again to have it."
    try:
        return format_summary(read_summary(path))
    except RlhfError as error:
        return str(error)
