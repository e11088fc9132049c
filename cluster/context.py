"""What stages share: configuration, run directory, records, and the fleets, each started when first needed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.fleet import Fleet
from actors.gang import LearnerGang
from actors.learner import LearnerWorker
from actors.ranks import RankInfo
from actors.recorder import RecorderWorker
from actors.remote_recorder import RemoteRecorder
from actors.settings import LearnerConfig
from actors.store import RayStore
from cluster.adoption import Adoption, Welcome, adoptable
from cluster.config import RunConfig, Stage
from cluster.control import ScaleRequests, clear_requests, request_stop
from cluster.joining import joined_cluster
from cluster.lease import Lease
from cluster.limits import fleet_limits, probe_limits
from cluster.observer import Board, observed
from cluster.placement import Placer, cluster_nodes
from cluster.planning import stage_plans
from cluster.roles import LearnerRole
from cluster.sharing import PARTS, build_gate, fleet_mover, gang_mover, refuse_scale, sharing_roles
from cluster.tending import Tending
from cluster.topology import fits
from rlhf.errors import RlhfError
from rlhf.loops.shared_gate import Mover, SharedGate
from rlhf.models.resolve import resolve_model
from rlhf.protocols import PhaseGate
from rlhf.runs.directory import RunDirectory
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.status import clear_status
from rlhf.runs.timings import Timings
from rlhf.types import Prompt


class StopRequestedError(RlhfError):
    """A signal asked the run to stop; what was done is saved."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy as it stands between stages: a Hugging Face folder and the version that its weights carry."""

    path: Path
    version: int


class TimedGate:
    """A gate that also adds each hold to the timings, as ``STAGE/ROLE``; the wait for the gate is not counted."""

    def __init__(self, gate: PhaseGate, timings: Timings, stage: str) -> None:
        self._gate = gate
        self._timings = timings
        self._stage = stage

    @contextlib.asynccontextmanager
    async def hold(self, role: str) -> AsyncIterator[None]:
        """See ``PhaseGate.hold``."""
        async with self._gate.hold(role):
            with self._timings.phase(f"{self._stage}/{role}"):
                yield


@dataclass
class RunContext:
    """Owner of everything that outlives a stage.

    Attributes:
        config: The resolved configuration.
        run: The run directory, locked by this driver.
        start: The model that the run started from.
        policy: The policy after the stages done so far.
        timings: Seconds and tokens by stage and role.
        metrics: ``metrics.jsonl`` and TensorBoard.
        gate: Who may compute.
        inputs: Prompts by purpose.
        stopping: Set by the first SIGTERM or SIGINT.
        serving: What the generation fleet holds; None while a learner publishes to it.
        reference: What the reference fleet holds.
        board: What ``rlhf status`` sees of the parts that the context does not own.
        lease: On what the run holds of a joined cluster.
    """

    config: RunConfig
    run: RunDirectory
    start: Policy
    policy: Policy
    timings: Timings
    metrics: MetricsLogger
    gate: PhaseGate
    inputs: Mapping[str, list[Prompt]]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    serving: Policy | None = None
    reference: Policy | None = None
    board: Board = field(default_factory=Board)
    lease: Lease | None = None
    _fleets: dict[str, Fleet] = field(default_factory=dict)
    _placers: dict[str, Placer] = field(default_factory=dict)
    _recorder: RemoteRecorder | None = None
    _placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a role is placed, so that none is placed twice."""
    _requests: ScaleRequests = field(init=False)
    _tending: Tending = field(init=False)
    _adoption: Adoption = field(init=False)

    def __post_init__(self) -> None:
        self._adoption = Adoption(self.lease, self.event)
        self._requests = ScaleRequests(self.run.root, self.event)
        self._tending = Tending(self.config, self.run, self.event)

    # Records

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one line of ``events.jsonl``."""
        self.run.events.record(kind, **fields)

    async def recorder(self) -> RemoteRecorder:
        """The actor that writes samples to parquet and owns what roles put into the object store."""
        async with self._placing:
            if self._recorder is None:
                resources = self.config.recorder
                kwargs = {"run": self.run.root, "store": RayStore()}
                made: dict[str, Any] = {"worker": RecorderWorker, "kwargs": kwargs, "replaced": ["run"]}  # files change
                made |= {"max_concurrency": 4, "restarts": resources.max_restarts > 0}
                placer = self._placers["recorder"] = await self._adoption.placer("recorder", resources, 1, **made)
                await self._adoption.admit("recorder", placer)
                handle = await asyncio.to_thread(placer.spawn, RecorderWorker, kwargs)
                limits, probes = fleet_limits(resources), probe_limits(resources)
                recorder = RemoteRecorder(handle, self.event, limits=limits, probes=probes)
                await recorder.start()
                self._recorder = recorder
                self._tending.recorder(recorder)
        return self._recorder

    async def store(self) -> RayStore:
        """The object store, with the recorder as owner of what is put."""
        return RayStore((await self.recorder()).handle, restart_timeout_s=self.config.recorder.start_timeout_s)

    def prompts(self, purpose: str) -> list[Prompt]:
        """The prompts of ``train``, ``validation`` or ``evaluation``."""
        return self.inputs[purpose]

    def timed_gate(self, stage: str) -> TimedGate:
        """The gate, adding up the seconds of a stage's phases."""
        return TimedGate(self.gate, self.timings, stage)

    # Models

    def at(self, learner: LearnerConfig, path: Path) -> LearnerConfig:
        """A learner's settings on the model at ``path`` and with the run's seed, where they name none themselves."""
        model = learner.model if learner.model.path else learner.model.model_copy(update={"path": str(path)})
        seed = self.config.seed if learner.seed is None else learner.seed
        return learner.model_copy(update={"model": model, "seed": seed})

    def at_policy(self, learner: LearnerConfig) -> LearnerConfig:
        """A learner's settings on the policy as it stands."""
        return self.at(learner, self.policy.path)

    def at_start(self, learner: LearnerConfig) -> LearnerConfig:
        """A learner's settings on the start model."""
        return self.at(learner, self.start.path)

    def forget_serving(self) -> None:
        """The generation fleet no longer holds the weights of any folder."""
        self.serving = None
        if "generation" in self._fleets:
            self._fleets["generation"].welcome = None

    # Fleets

    @property
    def fleets(self) -> Mapping[str, Fleet]:
        """Those that run, by role."""
        return self._fleets

    def has_fleet(self, role: str) -> bool:
        """Whether the role's fleet runs."""
        return role in self._fleets

    async def fleet(
        self,
        role: str,
        worker: type,
        kwargs: Mapping[str, Any],
        *,
        welcome: Welcome | None = None,
        welcomed: Sequence[str] = (),
    ) -> Fleet:
        """The fleet of a role, started on first use with as many replicas as the config or ``rlhf scale`` says.

        Args:
            role: The role.
            worker: Class of its actors.
            kwargs: Their arguments.
            welcome: Brings a replica of an earlier driver to what these arguments say.
            welcomed: Arguments that ``welcome`` replaces.
        """
        async with self._placing:
            if role in self._fleets:
                return self._fleets[role]
            wanted = self._wanted(role)
            refuse_scale(self.config, role, wanted)
            resources = self.config.resources(role)
            placer = self._placers[role] = await self._adoption.placer(
                role, resources, wanted, worker=worker, kwargs=kwargs, replaced=welcomed
            )
            in_turn = isinstance(self.gate, SharedGate) and role in sharing_roles(self.config.roles)
            made = (lambda _: placer.spawn(worker, kwargs), placer.retire)
            fleet = Fleet(role, *made, self.event, fleet_limits(resources), in_turn=in_turn)
            self._fleets[role] = fleet
        async with self.gate.hold(role):  # loading and warming up use all cores too
            with self.timings.phase(f"start/{role}"):
                await self._adoption.admit(role, placer, welcome)
                await fleet.scale(wanted)
            self._share(role, fleet_mover(fleet, self.timings))
        self._tending.fleet(fleet, worker)
        return fleet

    def _share(self, role: str, move: Mover) -> None:
        """Tells a shared gate of a role that has just started on the GPU that others use too."""
        if isinstance(self.gate, SharedGate) and role in sharing_roles(self.config.roles):
            self.gate.join(role, PARTS[role], move)

    def _unshare(self, role: str) -> None:
        if isinstance(self.gate, SharedGate):
            self.gate.leave(role)

    def _wanted(self, role: str) -> int:
        return self._requests.replicas(role, self.config.count(role))

    async def make_room(self, stage: Stage) -> None:
        """Ends fleets of earlier stages that this one does not use, where it could not be placed beside them.

        Otherwise they stay, as a later stage may use them and an engine takes long to start.
        """
        needed = [plan.role for plan in stage_plans(self.config, stage)]
        await self._adoption.end_unclaimed(adoptable(self.config, stage, needed))
        unused = [role for role in self._fleets if role not in needed]
        together = {role: self.config.plan(role, self._wanted(role)) for role in [*needed, *unused, "recorder"]}
        if not unused or fits(list(together.values()), await asyncio.to_thread(cluster_nodes)):
            return
        self.event("released", stage=stage.name, roles=unused)
        for role in unused:
            await self.release(role)

    async def release(self, role: str) -> None:
        """Ends a role's fleet and gives its placement back; nothing happens where there is none."""
        fleet = self._fleets.pop(role, None)
        self._unshare(role)
        await self._tending.leave(role)
        if fleet is not None:
            await fleet.stop()
            self._placers.pop(role).close()

    def gang(
        self, role: str, kwargs: Mapping[str, Any], *, loads: bool = False
    ) -> AbstractAsyncContextManager[LearnerGang]:
        """A learner gang for the length of a block; ``store`` and ``rank`` are added to every rank's arguments.

        ``loads`` says that a checkpoint will be loaded into it before anything else: then it may be an earlier
        driver's, whatever weights that one left in it.
        """
        return self._gang(role, kwargs, loads)

    @contextlib.asynccontextmanager
    async def _gang(self, role: str, kwargs: Mapping[str, Any], loads: bool) -> AsyncIterator[LearnerGang]:
        section: LearnerRole = getattr(self.config.roles, role)
        resources = section.resources
        common = dict(kwargs) | {"store": RayStore()}  # what a gang puts is of no use after it
        placer = await self._adoption.placer(
            role, resources, section.ranks, worker=LearnerWorker, kwargs=common, gang=True, fresh=not loads
        )
        is_kept = bool(placer.kept)
        meter, num_epochs = self.timings.add_tokens, kwargs["algorithm"].num_epochs
        gang = LearnerGang(role, [], timeout_s=resources.call_timeout_s, meter=meter, num_epochs=num_epochs)
        self.board.gangs[role] = gang
        try:
            for rank in range(section.ranks):
                info = RankInfo(
                    rank=rank,
                    world_size=section.ranks,
                    threads=resources.threads or 0,
                    device="cuda" if resources.gpus else "cpu",
                )
                variables = {"DS_ACCELERATOR": info.device}
                kwargs_of_rank = common | {"rank": info}
                gang.ranks.append(await asyncio.to_thread(placer.spawn, LearnerWorker, kwargs_of_rank, variables))
            if section.ranks > 1 and not is_kept:
                address, port = (await gang.call("rendezvous"))[0]
                await gang.call("join", lambda rank: (address, port))
            async with self.gate.hold(role):
                with self.timings.phase(f"start/{role}"):
                    if is_kept:
                        self.event("gang_adopted", role=role, num_ranks=len(gang.ranks))
                    else:
                        await gang.start()
                self._share(role, gang_mover(gang, self.timings))
            self._tending.gang(gang)
            yield gang
            await gang.stop()
        finally:
            self._unshare(role)
            self.board.gangs.pop(role, None)
            gang.kill()
            placer.close()
            await self._tending.leave(role)

    async def watch_control(self, interval_s: float = 1.0) -> None:
        """Scales fleets as ``rlhf scale`` asks, for as long as the run goes on; a request that fails is an event."""
        while True:
            await asyncio.sleep(interval_s)
            for role, wanted in self._requests.due(self._fleets).items():
                if (fleet := self._fleets.get(role)) is None:  # released while another one was scaled
                    continue
                await self._tending.by_hand(role)
                self.event("scaling", role=role, replicas=wanted)
                try:
                    refuse_scale(self.config, role, wanted)
                    await fleet.scale(wanted)
                except RlhfError as error:  # the run goes on with the replicas that it has
                    self._requests.refuse(role, error)

    def request_stop(self) -> None:
        """Asks the stage to save and end; ranks under Ray Train see it through the control folder."""
        self.stopping.set()
        request_stop(self.run.root)

    async def close(self) -> None:
        """Ends every fleet and the recorder."""
        await self._tending.close()
        for role in list(self._fleets):
            await self.release(role)
        for placer in self._placers.values():  # the recorder's
            placer.close()
        self.metrics.close()
        self.timings.write()


@contextlib.asynccontextmanager
async def open_context(
    config: RunConfig, run: RunDirectory, inputs: Mapping[str, list[Prompt]], stages: Sequence[Stage]
) -> AsyncIterator[RunContext]:
    """Joins or starts the cluster, checks by arithmetic that the stages fit, and ends everything at the block's end.

    Raises:
        ClusterError, ConfigError: No cluster, or one whose nodes do not share the run directory; as below.
        PlacementError: A stage does not fit; nothing was placed, and the directory of a new run is withdrawn.
    """
    clear_status(run.root)
    if clear_requests(run.root):
        run.events.record("scaling_dropped", reason="asked of an earlier driver; this one starts what the recipe says")
    async with joined_cluster(config, stages, run) as lease:
        start = Policy(resolve_model(config.model), 0)
        context = RunContext(
            config=config,
            run=run,
            start=start,
            policy=latest_policy(config, run, start),
            timings=Timings(run.timings),
            metrics=MetricsLogger(run.metrics, tensorboard=run.tensorboard),
            gate=build_gate(config),
            inputs=inputs,
            lease=lease,
        )
        async with observed(context):
            watch = asyncio.create_task(context.watch_control())
            try:
                yield context
            finally:
                watch.cancel()
                [ended] = await asyncio.gather(watch, return_exceptions=True)
                if isinstance(ended, Exception):
                    context.event("control_lost", error=repr(ended))
                await context.close()


def latest_policy(config: RunConfig, run: RunDirectory, start: Policy) -> Policy:
    """The policy that the last complete stage left, or the start model."""
    policy = start
    for stage in config.stages:
        if run.is_complete(stage.name) and "policy" in (results := run.results(stage.name)):
            policy = Policy(run.root / results["policy"], results["version"])
    return policy
