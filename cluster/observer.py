"""Watches a run from within its driver: ``status.json`` and the metrics for Prometheus, every two seconds.

The loops know nothing of it. It looks at what the driver holds anyway (fleets, timings, progress), follows what the
run's processes append to ``metrics.jsonl`` and ``events.jsonl``, and asks the cluster every ten seconds. No worker is
called. It runs in the driver's event loop: a driver that hangs stops writing, and readers see that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ray.exceptions import RayError

from actors.fleet_status import snapshot
from actors.telemetry import RUN_LABEL, Instruments
from cluster.telemetry import DRIVER_METRICS, ClusterView, cluster_view, forget_role, set_gauges, write_targets
from rlhf.errors import RecordError, RlhfError
from rlhf.runs.files import read_json_lines
from rlhf.runs.follow import NewLines
from rlhf.runs.memory import RUN_MARK, MemorySampler, read_peak_memory, write_peak_memory
from rlhf.runs.names import validation_stage
from rlhf.runs.progress import Steps
from rlhf.runs.status import (
    INTERVAL_S,
    MemoryStatus,
    RoleStatus,
    RunStatus,
    StageStatus,
    StepStatus,
    write_status,
)

if TYPE_CHECKING:
    from actors.gang import LearnerGang
    from cluster.context import RunContext

ROUNDS_PER_VIEW = 5
"""The cluster is asked in one of so many rounds."""

NUM_EVENTS = 10
"""Events in the status."""

LOSSES = ("replica_lost", "gang_lost")
"""Events that each stand for a replica or a gang that has to be restarted."""

_UNDER_RAY_TRAIN = ("sft", "reward", "preference")
_ENDS_OF_STAGE = ("stage_completed", "stage_failed", "stopped")
_MAX_TEXT = 300


class _HasSteps(Protocol):
    @property
    def steps(self) -> Steps | None: ...


@dataclass
class Board:
    """What a run's parts put up to be seen.

    Attributes:
        progress: How far each stage is, by its name.
        gangs: Living gangs by role.
    """

    progress: dict[str, _HasSteps] = field(default_factory=dict)
    gangs: dict[str, LearnerGang] = field(default_factory=dict)


class Observer:
    """Keeps a run's status and metrics up to date.

    Args:
        context: The run.
        memory: Its memory.
        instruments: Where metrics are recorded.
        view: Asks the cluster; called in a thread.
    """

    def __init__(
        self,
        context: RunContext,
        memory: MemorySampler,
        instruments: Instruments,
        *,
        view: Callable[[], ClusterView] = cluster_view,
    ) -> None:
        self._context = context
        self._memory = memory
        self._instruments = instruments
        self._ask_cluster = view
        self._started = time.time()
        self._events = NewLines(context.run.events.path)
        self._metrics = NewLines(context.run.metrics)
        self._line_times = _last_times(read_json_lines(context.run.metrics))
        self._recent: deque[dict[str, Any]] = deque(maxlen=NUM_EVENTS)
        self._restarts: dict[str, int] = {}
        self._complete: dict[str, bool] = {}
        self._stage: tuple[str, float] | None = None
        self._step: StepStatus | None = None
        self._validation: StepStatus | None = None
        self._tokens = context.timings.tokens()
        self._seconds = context.timings.totals()
        self._pace: dict[str, float] = {}
        self._roles: set[str] = set()
        self._round = 0
        self._view: ClusterView | None = None
        self._viewing: asyncio.Future[ClusterView] | None = None
        self._told = False

    async def run(self) -> None:
        """Goes on until it is cancelled; a round that fails is told once, as an event, and leaves out that round."""
        while True:
            try:
                await self.round()
            except (RlhfError, RayError, OSError) as error:
                self._tell(error)
            await asyncio.sleep(INTERVAL_S)

    async def round(self) -> None:
        """Looks around, sets the metrics and replaces ``status.json``."""
        await asyncio.to_thread(self._follow)
        await self._look_at_cluster()
        status = self._status()
        self._count()
        set_gauges(self._instruments, status)
        roles = {role.role for role in status.roles}
        for role in self._roles - roles:
            forget_role(self._instruments, role)
        self._roles = roles
        await asyncio.to_thread(write_status, self._context.run.root, status)

    async def close(self) -> None:
        """Writes what is left to say: the driver has ended by itself."""
        try:
            if self._viewing is not None:  # nobody needs its answer, nor its failure
                self._viewing.cancel()
                await asyncio.gather(self._viewing, return_exceptions=True)
            await asyncio.to_thread(self._follow)
            self._view = None
            status = self._status(ended=True)
            self._count()
            set_gauges(self._instruments, status)
            await asyncio.to_thread(write_status, self._context.run.root, status)
            await asyncio.to_thread(write_targets, self._context.run.root, ())
        except (RlhfError, RayError, OSError) as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            with contextlib.suppress(RecordError):  # a full disk may be what there is to tell
                self._context.event("status_lost", error=str(error))

    # What others write

    def _follow(self) -> None:
        for event in self._events.read():
            self._take_event(event)
        for line in self._metrics.read():
            self._take_line(line)
        run = self._context.run
        self._complete = {own.name: run.is_complete(own.name) for own in self._context.config.stages}

    def _take_event(self, event: Mapping[str, Any]) -> None:
        kind, role = str(event.get("kind")), str(event.get("role", ""))
        self._recent.append({key: _shortened(value) for key, value in event.items()})
        self._instruments.add("rlhf_events", 1, kind=kind)
        if kind in LOSSES:
            self._restarts[role] = self._restarts.get(role, 0) + 1
            self._instruments.add("rlhf_restarts", 1, role=role)
        if kind == "stage_started":
            self._stage = (str(event.get("stage")), float(event.get("time", time.time())))
        elif kind in _ENDS_OF_STAGE:
            self._stage = None

    def _take_line(self, line: Mapping[str, Any]) -> None:
        stage, moment = str(line.get("stage")), float(line.get("time", 0.0))
        before = self._line_times.get(stage)
        if before is not None and moment <= before:  # the file was rewritten: nothing new
            return
        self._line_times[stage] = moment
        seconds = None if self._step is None or self._step.stage != stage or before is None else moment - before
        step = StepStatus(
            stage=stage,
            step=int(line.get("step", 0)),
            seconds=None if seconds is None else round(seconds, 3),
            metrics=dict(line.get("metrics", {})),
        )
        for own in self._context.config.stages:
            if stage == validation_stage(own.name):
                self._validation = step.model_copy(update={"stage": own.name, "seconds": None})
                return
        self._step = step
        self._instruments.add("rlhf_steps", 1, stage=stage)
        self._instruments.add("rlhf_missing_scores", step.metrics.get("rollout/missing_scores") or 0, stage=stage)
        skipped = [value or 0 for name, value in step.metrics.items() if name.rpartition("/")[2] == "skipped"]
        self._instruments.add("rlhf_skipped_updates", sum(skipped), stage=stage)

    async def _look_at_cluster(self) -> None:
        """Takes what the cluster has answered and asks again when it is time; nothing waits for its answer."""
        if self._viewing is not None and self._viewing.done():
            viewing, self._viewing = self._viewing, None
            before, self._view = self._view, await viewing
            if before is None or before.endpoints != self._view.endpoints:
                await asyncio.to_thread(write_targets, self._context.run.root, self._view.endpoints)
        if self._viewing is None and self._round % ROUNDS_PER_VIEW == 0:
            self._viewing = asyncio.ensure_future(asyncio.to_thread(self._ask_cluster))
        self._round += 1

    # What the driver holds

    def _count(self) -> None:
        """Adds what the timings have grown by; the totals of earlier drivers are not told again."""
        timings = self._context.timings
        before, self._seconds = self._seconds, timings.totals()
        for stage, phases in self._seconds.items():
            for phase, seconds in phases.items():
                grown = seconds - before.get(stage, {}).get(phase, 0.0)
                self._instruments.add("rlhf_phase_seconds", grown, stage=stage, phase=phase)
                if phase == "checkpoint" and grown > 0:
                    self._instruments.set("rlhf_checkpoint_seconds", grown, stage=stage)

    def _count_tokens(self) -> None:
        before, self._tokens = self._tokens, self._context.timings.tokens()
        for role, (tokens, seconds) in self._tokens.items():
            tokens_before, seconds_before = before.get(role, (0.0, 0.0))
            self._instruments.add("rlhf_tokens", tokens - tokens_before, role=role)
            self._instruments.add("rlhf_busy_seconds", seconds - seconds_before, role=role)
            if seconds > seconds_before:
                self._pace[role] = (tokens - tokens_before) / (seconds - seconds_before)

    def _status(self, *, ended: bool = False) -> RunStatus:
        context, memory, view = self._context, self._memory, self._view
        self._count_tokens()
        stage = None if ended else self._stage_status()
        return RunStatus(
            run=context.run.root.name,
            time=time.time(),
            started=self._started,
            host=socket.gethostname(),
            pid=os.getpid(),
            ended=ended,
            stages=self._complete,
            stage=stage,
            roles=[] if ended else self._role_statuses(),
            step=self._step,
            validation=self._validation,
            events=list(self._recent),
            memory=MemoryStatus(
                driver_machine=int(memory.memory_gib * 2**30),
                driver_machine_peak=int(memory.peak_memory_gib * 2**30),
                object_store=None if view is None else view.object_store,
                object_store_capacity=None if view is None else view.capacity,
            ),
            metrics_endpoints=[] if view is None else list(view.endpoints),
        )

    def _stage_status(self) -> StageStatus | None:
        if self._stage is None:
            return None
        name, started = self._stage
        progress = self._context.board.progress.get(name)
        steps = None if progress is None else progress.steps
        return StageStatus(
            name=name,
            seconds=round(max(0.0, time.time() - started), 3),
            done=None if steps is None else steps.done,
            total=None if steps is None else steps.total,
            seconds_left=None if steps is None else steps.seconds_left,
        )

    def _role_statuses(self) -> list[RoleStatus]:
        context = self._context
        found = [
            RoleStatus(
                role=fleet.role,
                wanted=fleet.wanted,
                replicas=dict(fleet.replicas),
                version=fleet.version,
                items=fleet.items,
                calls=fleet.calls,
                **self._work_of(fleet.role),
            )
            for fleet in map(snapshot, context.fleets.values())
        ]
        gangs = {role: (len(gang.ranks), gang.lock.locked()) for role, gang in context.board.gangs.items()}
        kinds = {own.name: own.kind for own in context.config.stages}
        if self._stage is not None and kinds.get(self._stage[0]) in _UNDER_RAY_TRAIN:
            gangs["learner"] = (context.config.roles.learner.ranks, True)
        for role, (num_ranks, at_work) in gangs.items():
            found.append(
                RoleStatus(
                    role=role,
                    kind="gang",
                    wanted=getattr(context.config.roles, role).ranks,
                    replicas={"healthy": num_ranks},
                    calls=num_ranks if at_work else 0,
                    **self._work_of(role),
                )
            )
        return found

    def _work_of(self, role: str) -> dict[str, Any]:
        return {"tokens_per_second": self._pace.get(role), "restarts": self._restarts.get(role, 0)}


@contextlib.asynccontextmanager
async def observed(context: RunContext) -> AsyncIterator[None]:
    """Keeps a run's status and metrics up to date for the length of a block, and its memory after it.

    Ray is connected.
    """
    os.environ[RUN_LABEL] = context.run.root.name  # of all workers that are placed from here on
    with MemorySampler(marker=os.environ[RUN_MARK], initial_gib=read_peak_memory(context.run)) as memory:
        observer = Observer(context, memory, Instruments(DRIVER_METRICS, context.run.root.name))
        watching = asyncio.create_task(observer.run())
        try:
            yield
        finally:
            watching.cancel()
            [ended] = await asyncio.gather(watching, return_exceptions=True)
            if isinstance(ended, Exception):  # of the display only; the run went on
                context.event("status_lost", error=repr(ended))
            peak_gib = memory.stop()
            await observer.close()
            write_peak_memory(context.run, peak_gib)


def _last_times(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The time of each stage's last line."""
    return {str(line.get("stage")): float(line.get("time", 0.0)) for line in lines}


def _shortened(value: Any) -> Any:
    text = value if isinstance(value, str) else None
    return value if text is None or len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
