"""``RUN/status.json``: how a run stands at this moment, for whoever sees the run directory.

The driver replaces the file every two seconds. A reader needs no connection to it, only the directory: on a shared file
system any machine will do. What the file says is as old as the file; ``read_status`` says how old, and whether a driver
is at work.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf.errors import RecordError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.files import TEMPORARY, read_json, unwritable

INTERVAL_S = 2.0
"""Seconds between two versions of the file."""

SILENT_AFTER_S = 60.0
"""Age from which a file says that its driver hangs: more than loading libraries on a busy machine holds it up."""


class _Part(BaseModel):
    """Part of the file. Keys that a reader does not know are left out: driver and reader may be of two versions."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class StageStatus(_Part):
    """The stage at work."""

    name: str
    """As in the recipe."""
    seconds: float = 0.0
    """Since it started, or was resumed."""
    done: int | None = None
    """Steps, prompts or completions done; None while that is unknown."""
    total: int | None = None
    """Of how many."""
    seconds_left: float | None = None
    """At the pace so far."""


class RoleStatus(_Part):
    """One role."""

    role: str
    """Its name."""
    kind: Literal["fleet", "gang"] = "fleet"
    """Replicas that work for themselves, or ranks that move in step."""
    wanted: int = 0
    """Replicas or ranks that were asked for."""
    replicas: dict[str, int] = {}
    """How many are in each state."""
    version: int | None = None
    """Weights that it serves."""
    items: int = 0
    """Prompts or groups that were handed out and have not all come back."""
    calls: int = 0
    """Calls in flight over all replicas."""
    tokens_per_second: float | None = None
    """Of its last piece of work, all replicas together."""
    restarts: int = 0
    """Replicas and gangs that were lost since this driver started."""


class StepStatus(_Part):
    """The last step that was logged."""

    stage: str
    """Whose step."""
    step: int
    """Its number."""
    seconds: float | None = None
    """Since the step before."""
    metrics: dict[str, float | None] = {}
    """Its scalars; null is a number that was not finite."""


class MemoryStatus(_Part):
    """Memory, in bytes."""

    driver_machine: int = 0
    """PSS of the run's processes on the driver's machine."""
    driver_machine_peak: int = 0
    """Its highest value, earlier drivers included."""
    object_store: int | None = None
    """In use in the object stores of all nodes of the cluster."""
    object_store_capacity: int | None = None
    """Of all nodes."""


class RunStatus(_Part):
    """Everything in ``status.json``."""

    run: str
    """The run directory's name: the ``run`` label of its metrics."""
    time: float
    """When it was written, in seconds since 1970."""
    started: float
    """When this driver started."""
    host: str
    """The driver's machine."""
    pid: int
    """The driver's process."""
    ended: bool = False
    """Whether the driver has come to an end by itself; nobody could write that for one that was killed."""
    stages: dict[str, bool] = Field(default_factory=dict)
    """Each stage of the recipe, and whether it is complete."""
    stage: StageStatus | None = None
    """None between stages."""
    roles: list[RoleStatus] = []
    """Those that have replicas or ranks now."""
    step: StepStatus | None = None
    """None before the first step."""
    validation: StepStatus | None = None
    """The last validation of reinforcement learning."""
    events: list[dict[str, Any]] = []
    """The last lines of ``events.jsonl`` since this driver started, oldest first."""
    memory: MemoryStatus = MemoryStatus()
    """What the run takes."""
    metrics_endpoints: list[str] = []
    """``address:port`` where Prometheus gets each node's metrics."""


class Health(StrEnum):
    """What is to be thought of a run."""

    COMPLETE = "complete"
    RUNNING = "running"
    STARTING = "starting"
    SILENT = "silent"
    ENDED = "ended"
    LOST = "lost"
    NEW = "new"

    @property
    def is_well(self) -> bool:
        """Whether it is complete or goes on."""
        return self in (Health.COMPLETE, Health.RUNNING, Health.STARTING)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader found.

    Attributes:
        health: What is to be thought of it.
        status: The file; None where there is none, or it cannot be read.
        age_s: Seconds since it was written, by this machine's clock.
        held: Whether a driver's lock can be seen from here.
        problem: Why the file cannot be read.
    """

    health: Health
    status: RunStatus | None
    age_s: float
    held: bool
    problem: str = ""


def status_path(root: Path) -> Path:
    """Where a run's status is."""
    return root / "status.json"


def write_status(root: Path, status: RunStatus) -> None:
    """Replaces the file in one step.

    Nothing is forced to the disk: after a crash of the machine it would be out of date anyway.

    Raises:
        RecordError: The disk is full, or the directory cannot be written.
    """
    path = status_path(root)
    temporary = path.with_name(TEMPORARY + path.name)
    text = json.dumps(status.model_dump(mode="json"), allow_nan=False, ensure_ascii=False, indent=1)
    try:
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from error


def clear_status(root: Path) -> None:
    """Removes what an earlier driver left, so that nobody takes it for the new one's."""
    status_path(root).unlink(missing_ok=True)


def load_status(root: Path) -> RunStatus | None:
    """Reads the file; None where there is none.

    Raises:
        RecordError: It is damaged.
    """
    path = status_path(root)
    if not path.is_file():
        return None
    try:
        return RunStatus.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RecordError(
            str(path),
            found=f"{key}: {first['msg']}",
            needed="what a driver writes",
            action="A driver at work writes it anew within seconds; otherwise remove the file.",
        ) from None


def read_status(root: Path, *, now: float | None = None) -> Reading:
    """Reads a run's status and says what is to be thought of it.

    Locks may not reach other machines, and clocks differ by seconds: a file that is fresh and comes from another
    machine counts as a sign of life even where no lock is seen.

    Raises:
        ConfigError: This is not a run directory.
    """
    run = RunDirectory(root)
    config = run.resolved_config()
    held = run.is_held()
    status, problem = None, ""
    try:
        status = load_status(root)
    except RecordError as error:
        problem = str(error)
    complete = all(run.is_complete(name) for name in _stage_names(config))
    age = 0.0 if status is None else max(0.0, (time.time() if now is None else now) - status.time)
    return Reading(_health(status, age, held=held, complete=complete), status, age, held, problem)


def _health(status: RunStatus | None, age_s: float, *, held: bool, complete: bool) -> Health:
    fresh = status is not None and age_s < SILENT_AFTER_S
    if held:
        if status is None:  # a driver that starts removes what an earlier one left
            return Health.STARTING
        return Health.RUNNING if fresh or status.ended else Health.SILENT
    if complete:
        return Health.COMPLETE
    if status is None:
        return Health.NEW
    if status.ended:
        return Health.ENDED
    return Health.RUNNING if fresh and status.host != socket.gethostname() else Health.LOST


def _stage_names(config: Mapping[str, Any]) -> list[str]:
    return [stage["name"] for stage in config.get("stages", [])]
