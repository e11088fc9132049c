"""A driver of small actors on a joined cluster, for tests that end it: ``python -m tests.cluster.joined_driver``.

Its argument is JSON: ``address``, ``run`` (a run directory), ``timeout_s`` of the lease, and ``roles``: for each a
``count`` and, where wanted, ``resources``, a ``word`` that its workers are made with, ``gang``, ``fresh`` or
``restarts`` (then it is called as the recorder is). It prints what it has in one line of JSON, and once more for every
line of its input, for which it gives the fleets work. It ends in order with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from actors.calls import await_ref
from actors.fleet import Event, Fleet, FleetLimits
from actors.remote_recorder import RemoteRecorder
from cluster.adoption import Adoption
from cluster.lease import Lease
from cluster.placement import connect, disconnect
from cluster.topology import Resources
from rlhf.errors import EngineError
from rlhf.runs.directory import RunDirectory

Placed = Fleet | RemoteRecorder | list[Any]


class Speaker:
    """Says its word."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.told: list[str] = []

    def ping(self) -> str:
        return str(os.getpid())

    def about(self) -> dict[str, Any]:
        import ray

        return {
            "pid": os.getpid(),
            "word": self.word,
            "told": self.told,
            "node": ray.get_runtime_context().get_node_id(),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        }

    def start(self) -> None:
        self.told.append("start")

    def say(self, items: list[str]) -> list[str]:
        return [f"{self.word} {item}" for item in items]

    def abandon(self) -> None:
        self.told.append("abandon")

    def welcome(self, word: str) -> None:
        if self.word == "hoarse":
            raise EngineError("speaker", found="no voice", needed="one", action="None.")
        self.told.append(word)


async def place(adoption: Adoption, role: str, wanted: dict[str, Any], event: Event) -> Placed:
    """One role's fleet, the handles of its gang, or its one actor that is started again where it dies."""

    async def welcome(handle: Any) -> None:
        await await_ref(handle.welcome.remote("hello"), timeout_s=30.0, where=role)

    resources = Resources(cpus=0.1, threads=1, start_timeout_s=60.0, **wanted.get("resources", {}))
    kwargs = {"word": wanted.get("word", "a")}
    flags = {name: wanted.get(name, False) for name in ("gang", "fresh", "restarts")}
    placer = await adoption.placer(role, resources, wanted["count"], worker=Speaker, kwargs=kwargs, **flags)
    await adoption.admit(role, placer, welcome)
    if flags["gang"]:
        return [await asyncio.to_thread(placer.spawn, Speaker, kwargs) for _ in range(wanted["count"])]
    if flags["restarts"]:
        return RemoteRecorder(await asyncio.to_thread(placer.spawn, Speaker, kwargs), event, timeout_s=120.0)
    limits = FleetLimits(start_timeout_s=60.0, call_timeout_s=30.0)
    fleet = Fleet(role, lambda _: placer.spawn(Speaker, kwargs), placer.retire, event, limits)
    await fleet.scale(wanted["count"])
    return fleet


async def ask(placed: Placed) -> list[dict[str, Any]]:
    """What every actor of a role says of itself."""
    if isinstance(placed, RemoteRecorder):
        return [await placed.call("about")]
    handles = [replica.handle for replica in placed.healthy] if isinstance(placed, Fleet) else placed
    return [await await_ref(handle.about.remote(), timeout_s=60.0, where="about") for handle in handles]


async def main(wanted: dict[str, Any]) -> None:
    """Places, tells, works, ends."""
    events: list[dict[str, Any]] = []

    def event(kind: str, **fields: Any) -> None:
        events.append({"kind": kind, **fields})

    connect(wanted["address"], num_cpus=None, object_store_bytes=None)
    lease = await asyncio.to_thread(Lease.take, RunDirectory(Path(wanted["run"])), wanted["timeout_s"])
    adoption = Adoption(lease, event)
    inherited = 0 if lease is None else lease.num_inherited
    held = None if lease is None else (await asyncio.to_thread(lease.held)).cpus
    await adoption.end_unclaimed(wanted["roles"])
    roles = {role: await place(adoption, role, its, event) for role, its in wanted["roles"].items()}
    while True:
        about = {role: await ask(placed) for role, placed in roles.items()}
        print(json.dumps({"roles": about, "events": events, "inherited": inherited, "held": held}), flush=True)
        if not await asyncio.to_thread(sys.stdin.readline):
            break
        for fleet in roles.values():
            if isinstance(fleet, Fleet):
                assert await fleet.scatter("say", list("abcdef")) == [f"a {letter}" for letter in "abcdef"]
                await fleet.replaced()
    if lease is not None:
        await asyncio.to_thread(lease.close)
    disconnect()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
