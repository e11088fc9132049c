"""What goes on beside the stages for every role: probes, the stall watchdog, the autoscaler."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from actors.prober import FleetProber, GangProber, ProbeLimits, Prober
from actors.remote_recorder import ROLE
from cluster.autoscale import autoscale
from cluster.limits import probe_limits
from cluster.stalls import StallWatch

if TYPE_CHECKING:
    from actors.dispatch import Event
    from actors.fleet import Fleet
    from actors.gang import LearnerGang
    from actors.remote_recorder import RemoteRecorder
    from cluster.config import RunConfig
    from rlhf.runs.directory import RunDirectory


class Tending:
    """Tends the roles of one driver, from their start to their end.

    Args:
        config: The resolved configuration.
        run: The run directory.
        event: Event log.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, event: Event) -> None:
        self._config = config
        self._run = run
        self._event = event
        self._probers: dict[str, Prober] = {}
        self._fleets: dict[str, Fleet] = {}
        self._gangs: dict[str, LearnerGang] = {}
        self._alone: dict[str, Any] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._by_hand: set[str] = set()
        roles = config.roles
        sections = [getattr(roles, name) for name in type(roles).model_fields]
        stall_timeout_s = max(section.resources.stall_timeout_s for section in sections)
        self._stalls = StallWatch(run.root, event, stall_timeout_s, actors=self._actors, progress=self._progress)

    def fleet(self, fleet: Fleet, worker: type) -> None:
        """Tends a fleet whose first replicas serve; ``worker`` is their class."""
        role = fleet.role
        in_loop = inspect.iscoroutinefunction(getattr(worker, "probe", None))
        prober = FleetProber(fleet, self._limits(role), self._stalls.stalled, in_loop=in_loop)
        self._fleets[role], self._probers[role] = fleet, prober
        self._start(role, "probe", prober.run())
        section = getattr(self._config.roles, role, None)
        policy = getattr(section, "autoscale", None)
        if policy is not None and role not in self._by_hand:
            self._start(role, "autoscale", autoscale(fleet, policy, self._event))

    def gang(self, gang: LearnerGang) -> None:
        """Tends a gang that has started."""
        prober = GangProber(gang, self._limits(gang.role), self._stalls.stalled)
        self._gangs[gang.role], self._probers[gang.role] = gang, prober
        self._start(gang.role, "probe", prober.run())

    def recorder(self, recorder: RemoteRecorder) -> None:
        """Tends the recorder, to the end of the driver."""
        self._alone[ROLE] = recorder.handle
        self._start(ROLE, "probe", recorder.watch())

    async def by_hand(self, role: str) -> None:
        """Leaves a role's replicas to ``rlhf scale``, for as long as this driver lives."""
        self._by_hand.add(role)
        if (role, "autoscale") in self._tasks:
            await self._end([(role, "autoscale")])
            self._event("autoscale_paused", role=role, reason="rlhf scale; the next driver takes it up again")

    async def leave(self, role: str) -> None:
        """Tends a role no more, before it is ended; one that was never tended is left alone."""
        await self._end([key for key in self._tasks if key[0] == role])
        for known in (self._probers, self._fleets, self._gangs):
            known.pop(role, None)

    async def close(self) -> None:
        """Ends all of it."""
        await self._end(list(self._tasks))

    def _limits(self, role: str) -> ProbeLimits:
        return probe_limits(self._config.resources(role))

    def _start(self, role: str, what: str, work: Coroutine[Any, Any, None]) -> None:
        if ("", "stalls") not in self._tasks:
            self._tasks["", "stalls"] = asyncio.create_task(self._stalls.run(), name="stall watchdog")
        self._tasks[role, what] = asyncio.create_task(work, name=f"{what} {role}")

    async def _end(self, keys: list[tuple[str, str]]) -> None:
        tasks = {key: self._tasks.pop(key) for key in keys}
        for task in tasks.values():
            task.cancel()
        ended = await asyncio.gather(*tasks.values(), return_exceptions=True)
        for (role, what), result in zip(tasks, ended, strict=True):
            if isinstance(result, Exception):  # a defect of the tending itself, which the run has outlived
                self._event("tending_lost", role=role, task=what, error=repr(result))

    def _actors(self) -> Mapping[str, Any]:
        replicas = [(fleet.role, replica) for fleet in self._fleets.values() for replica in fleet.present]
        found = {f"{role}[{replica.index}]": replica.handle for role, replica in replicas if replica.handle is not None}
        found |= self._alone
        for role, gang in self._gangs.items():
            found |= {f"{role}[{rank}]": handle for rank, handle in enumerate(gang.ranks)}
        return found

    def _progress(self) -> tuple[float, ...]:
        files = [path for path in (self._run.metrics, self._run.events.path) if path.is_file()]
        done = sum(prober.num_done for prober in self._probers.values())
        return (*(float(path.stat().st_size) for path in files), float(done), float(len(self._tasks)))
