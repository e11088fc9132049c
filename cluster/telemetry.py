"""The driver's metrics: their names, and what they are set to from a run's status.

``actors.telemetry`` says how they reach Prometheus and why through Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.replicas import ReplicaState
from actors.telemetry import ENGINE_METRICS, Instruments, Metric
from rlhf.runs.files import write_json
from rlhf.runs.status import RoleStatus, RunStatus, StepStatus

DRIVER_METRICS = (
    Metric("rlhf_driver_up", "gauge", "1 while a driver is at work"),
    Metric("rlhf_stage_done_ratio", "gauge", "Share of a stage that is done", ("stage",)),
    Metric("rlhf_steps", "counter", "Steps that were logged, those done again after a restart included", ("stage",)),
    Metric("rlhf_step_seconds", "gauge", "Seconds between the last two steps, with all that came between", ("stage",)),
    Metric("rlhf_phase_seconds", "counter", "Seconds in which a phase was at work; phases overlap", ("stage", "phase")),
    Metric("rlhf_checkpoint_seconds", "gauge", "Seconds that the last checkpoint held its stage up", ("stage",)),
    Metric("rlhf_replicas", "gauge", "Replicas, or ranks of a gang, by state", ("role", "state")),
    Metric("rlhf_replicas_wanted", "gauge", "Replicas or ranks that were asked for last", ("role",)),
    Metric("rlhf_items_in_flight", "gauge", "Prompts or groups handed out that have not all come back", ("role",)),
    Metric("rlhf_calls_in_flight", "gauge", "Calls that replicas are at", ("role",)),
    Metric("rlhf_restarts", "counter", "Replicas and gangs that were lost and had to be restarted", ("role",)),
    Metric("rlhf_events", "counter", "Lines of events.jsonl by kind", ("kind",)),
    Metric("rlhf_tokens", "counter", "Tokens drawn, read or trained on", ("role",)),
    Metric("rlhf_busy_seconds", "counter", "Seconds that these tokens took", ("role",)),
    Metric("rlhf_weight_version", "gauge", "Version of the weights that a role serves", ("role",)),
    Metric("rlhf_staleness_updates", "gauge", "Updates between a batch's oldest weights and the learner's", ("stage",)),
    Metric("rlhf_publication_seconds", "gauge", "Seconds that the last publication took"),
    Metric("rlhf_publication_bytes", "gauge", "Bytes of weights that it sent"),
    Metric("rlhf_score_mean", "gauge", "Mean score of the last step's completions", ("stage",)),
    Metric("rlhf_score_std", "gauge", "Their standard deviation", ("stage",)),
    Metric("rlhf_validation_score", "gauge", "Mean score of the last validation", ("stage",)),
    Metric("rlhf_missing_scores", "counter", "Scores that could not be had", ("stage",)),
    Metric("rlhf_skipped_updates", "counter", "Updates skipped as loss or gradient was not finite", ("stage",)),
    Metric(
        "rlhf_training", "gauge", "Every scalar of the last step, by its name in metrics.jsonl", ("stage", "scalar")
    ),
    Metric("rlhf_memory_bytes", "gauge", "Memory (PSS) of the run's processes on the driver's machine"),
    Metric("rlhf_object_store_bytes", "gauge", "Object store memory in use on all nodes"),
    Metric("rlhf_object_store_capacity_bytes", "gauge", "Object store memory of all nodes"),
)
"""Recorded by the driver, every two seconds."""

METRICS = (*DRIVER_METRICS, *ENGINE_METRICS)
"""All metrics of a run."""

STATES = tuple(state.value for state in ReplicaState)

_OF_STEP = {
    "rlhf_score_mean": "rollout/score",
    "rlhf_score_std": "rollout/score_std",
    "rlhf_staleness_updates": "rollout/staleness",
}


def set_gauges(instruments: Instruments, status: RunStatus) -> None:
    """Sets every gauge that a run's status has a value for."""
    instruments.set("rlhf_driver_up", 0.0 if status.ended else 1.0)
    if (stage := status.stage) is not None and stage.done is not None and stage.total:
        instruments.set("rlhf_stage_done_ratio", stage.done / stage.total, stage=stage.name)
    for role in status.roles:
        _set_role(instruments, role)
    if status.step is not None:
        _set_step(instruments, status.step)
    if (validation := status.validation) is not None:
        if (score := validation.metrics.get("validation/score")) is not None:
            instruments.set("rlhf_validation_score", score, stage=validation.stage)
        _set_scalars(instruments, validation)
    memory = status.memory
    instruments.set("rlhf_memory_bytes", memory.driver_machine)
    if memory.object_store is not None and memory.object_store_capacity is not None:
        instruments.set("rlhf_object_store_bytes", memory.object_store)
        instruments.set("rlhf_object_store_capacity_bytes", memory.object_store_capacity)


def forget_role(instruments: Instruments, role: str) -> None:
    """Sets the gauges of a role that has been released to nothing."""
    _set_role(instruments, RoleStatus(role=role))


def _set_role(instruments: Instruments, status: RoleStatus) -> None:
    for state in dict.fromkeys((*STATES, *status.replicas)):
        instruments.set("rlhf_replicas", status.replicas.get(state, 0), role=status.role, state=state)
    instruments.set("rlhf_replicas_wanted", status.wanted, role=status.role)
    instruments.set("rlhf_items_in_flight", status.items, role=status.role)
    instruments.set("rlhf_calls_in_flight", status.calls, role=status.role)
    if status.version is not None:
        instruments.set("rlhf_weight_version", status.version, role=status.role)


def _set_step(instruments: Instruments, step: StepStatus) -> None:
    for name, key in _OF_STEP.items():
        if (value := step.metrics.get(key)) is not None:
            instruments.set(name, value, stage=step.stage)
    if step.seconds is not None:
        instruments.set("rlhf_step_seconds", step.seconds, stage=step.stage)
    for what in ("seconds", "bytes"):
        if (value := step.metrics.get(f"publish/{what}")) is not None:
            instruments.set(f"rlhf_publication_{what}", value)
    _set_scalars(instruments, step)


def _set_scalars(instruments: Instruments, step: StepStatus) -> None:
    for name, value in step.metrics.items():
        if value is not None:
            instruments.set("rlhf_training", value, stage=step.stage, scalar=name)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What the cluster knows of itself.

    Attributes:
        endpoints: ``address:port`` of each living node's metrics.
        object_store: Bytes in use in all object stores.
        capacity: Bytes of all object stores.
    """

    endpoints: tuple[str, ...]
    object_store: int
    capacity: int


def cluster_view() -> ClusterView:
    """Asks the cluster; blocks for a moment."""
    import ray

    capacity = int(ray.cluster_resources().get("object_store_memory", 0.0))
    free = int(ray.available_resources().get("object_store_memory", 0.0))
    return ClusterView(metrics_endpoints(ray.nodes()), max(0, capacity - free), capacity)


def metrics_endpoints(nodes: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Where Prometheus gets the metrics of each living node, from what ``ray.nodes()`` returns."""
    found = []
    for node in nodes:
        address, port = node["NodeManagerAddress"], node["MetricsExportPort"]
        if node["Alive"] and port > 0:  # a node whose metrics are switched off has none
            found.append(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
    return tuple(sorted(found))


def targets_path(run: Path) -> Path:
    """Prometheus' list of targets of a run, for ``file_sd_configs``."""
    return run / "prometheus.json"


def write_targets(run: Path, endpoints: Sequence[str]) -> None:
    """Tells a Prometheus that follows the file where the metrics are; none is written as an empty list.

    Raises:
        RecordError: The file cannot be written.
    """
    group = {"labels": {"job": "rlhf"}, "targets": list(endpoints)}
    write_json(targets_path(run), [group] if endpoints else [])


def metrics_table() -> list[str]:
    """The metrics as a Markdown table, one line each."""
    rows = [
        f"| `{metric.exported}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |" for metric in METRICS
    ]
    return list(itertools.chain(["| metric | kind | labels | what it is |", "|---|---|---|---|"], rows))
