"""A small worker with faults on order, and a fleet of it on real Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.fleet import Fleet, FleetLimits
from actors.health import ProbedLoop
from actors.store import RayStore
from cluster.placement import Placer
from cluster.topology import Resources
from rlhf.errors import DataError, EngineError, PublicationError


@dataclass(frozen=True)
class Item:
    """What is asked for."""

    uid: str


@dataclass(frozen=True)
class Answer:
    """What a worker makes of an item; says who made it."""

    uid: str
    worker: int


@dataclass(frozen=True)
class Fault:
    """What goes wrong in ``method`` of one worker, once ``after`` items or calls are done."""

    method: str
    kind: str
    after: int = 0


class EchoWorker(ProbedLoop):
    """Answers items with its index. Async like the generation worker: calls overlap.

    It dies of an item whose uid is ``poison``, and before it has run where it is ``unborn``.
    """

    def __init__(
        self, index: int, fault: Fault | None = None, version: int = -1, poison: str = "", unborn: bool = False
    ) -> None:
        if unborn:
            os.kill(os.getpid(), signal.SIGKILL)
        self.index = index
        self.poison = poison
        self.fault = fault
        self.version = version
        self.calls: list[str] = []
        self.buckets: list[int] = []
        self.digest = ""

    async def _enter(self, method: str) -> None:
        self.calls.append(method)
        if self.fault is not None and self.fault.method == method:
            done = self.calls.count(method) - 1
            if done >= self.fault.after:
                await self._fail()

    async def _fail(self) -> None:
        match self.fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                await asyncio.sleep(1000)
            case "defect":
                raise KeyError("a defect of the worker")
            case "timeout":
                raise TimeoutError("the worker's own")
            case "engine":
                raise EngineError(f"worker {self.index}", found="a dead engine", needed="a living one", action="None.")
            case "data":
                raise DataError("prompt p0", found="no tokens", needed="some", action="Mend the prompt.")
            case "bucket":
                raise PublicationError("bucket 1", found="a wrong digest", needed="the right one", action="Again.")

    async def start(self) -> None:
        await self._enter("start")

    async def stop(self) -> None:
        await self._enter("stop")

    async def seen(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "calls": self.calls,
            "version": self.version,
            "buckets": self.buckets,
            "digest": self.digest,
        }

    async def load(self, version: int) -> int:
        await self._enter("load")
        self.version = version
        return self.index

    async def answer(self, items: Sequence[Item], seconds: float = 0.0) -> list[Answer]:
        with self.at_work():
            await self._enter("answer")
            await asyncio.sleep(seconds)
        return [Answer(item.uid, self.index) for item in items]

    async def stream(self, items: Sequence[Item], seconds: float = 0.0) -> AsyncGenerator[Answer, None]:
        for done, item in enumerate(items):
            if self.fault is not None and self.fault.method == "stream" and done == self.fault.after:
                if self.fault.kind == "short":
                    return
                await asyncio.sleep(0.2)  # what was yielded is on its way
                await self._fail()
            await asyncio.sleep(seconds)
            if item.uid == self.poison:
                os.kill(os.getpid(), signal.SIGKILL)
            yield Answer(item.uid, self.index)

    async def begin_update(self, version: int) -> None:
        await self._enter("begin_update")
        self.buckets = []

    async def receive_bucket(self, handles: Sequence[Any]) -> None:
        await self._enter("receive_bucket")
        self.buckets.append(await asyncio.to_thread(RayStore(timeout_s=60.0).get, *handles))

    async def finish_update(self, version: int, digest: str) -> None:
        await self._enter("finish_update")
        self.version, self.digest = version, digest


@dataclass
class EchoFleet:
    """A fleet of ``EchoWorker``s; ``faults`` are by index, so a replacement (another index) is well unless named.

    A fault ``create`` lets the first ``after`` actors of its index die before they have run.
    """

    faults: Mapping[int, Fault] = field(default_factory=dict)
    limits: FleetLimits = field(default_factory=lambda: FleetLimits(80.0, 20.0, 3))
    size: int = 4
    poison: str = ""
    resources: Resources = Resources(cpus=0.1, threads=1, start_timeout_s=30.0)

    def __post_init__(self) -> None:
        self.spawned: Counter[int] = Counter()
        self.placer = Placer("echo", self.resources, self.size)
        self.placer.reserve()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.fleet = Fleet("echo", self._spawn, self.placer.retire, self._event, self.limits)

    def _spawn(self, index: int) -> Any:
        fault = self.faults.get(index)
        unborn = fault is not None and fault.method == "create" and self.spawned[index] < fault.after
        self.spawned[index] += 1
        kwargs = {"index": index, "fault": fault, "poison": self.poison, "unborn": unborn}
        return self.placer.spawn(EchoWorker, kwargs)

    def _event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    async def __aenter__(self) -> EchoFleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.fleet.stop()
        self.placer.close()


def items(num_items: int) -> list[Item]:
    """Items ``p0``, ``p1``, ..."""
    return [Item(f"p{i}") for i in range(num_items)]


def workers_of(answers: Sequence[Answer]) -> list[int]:
    """Who answered, in order."""
    return [answer.worker for answer in answers]


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Waits for a condition of this process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.01)
