"""What goes on beside the stages: who is tended, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.health import ProbedLoop, ProbedThread
from actors.remote_recorder import RemoteRecorder
from cluster.tending import Tending
from rlhf.errors import ConfigError
from rlhf.runs.directory import RunDirectory
from tests.cluster.test_sharing import SLEEPING, gpus, recipe

BY_LOAD = {"max_replicas": 3, "target_items_per_replica": 1.0}


class FakeFleet:
    """A fleet that nobody works with, of one replica."""

    def __init__(self, role: str) -> None:
        self.role, self.wanted, self.backlog = role, 1, 0
        self.present = [SimpleNamespace(index=0, handle=f"{role}'s actor", state="starting")]


def drive(folder: Path, roles: Mapping[str, Any], body: Callable[[Tending, list[str]], Awaitable[None]]) -> None:
    async def run() -> None:
        config = recipe(dict(roles), gate="exclusive")
        events: list[str] = []
        with RunDirectory.open(folder / "run", config) as directory:
            tending = Tending(config, directory, lambda kind, **fields: events.append(kind))
            try:
                async with asyncio.timeout(30):
                    await body(tending, events)
            finally:
                await tending.close()
            assert tasks() == [], "nothing goes on after the end"

    asyncio.run(run())


def tasks() -> list[str]:
    named = (task.get_name() for task in asyncio.all_tasks())
    return sorted(name for name in named if name.startswith(("probe", "autoscale", "stall")))


def fleet(role: str) -> Any:
    return FakeFleet(role)


def test_a_role_is_tended_until_it_is_left(tmp_path: Path) -> None:
    async def body(tending: Tending, events: list[str]) -> None:
        tending.fleet(fleet("generation"), ProbedLoop)
        tending.fleet(fleet("judge"), ProbedLoop)
        tending.fleet(fleet("rules"), ProbedThread)
        tending.recorder(RemoteRecorder("the recorder's actor"))
        probed = ["probe generation", "probe judge", "probe recorder", "probe rules"]
        everybody = ["autoscale generation", *probed, "stall watchdog"]
        assert tasks() == everybody
        assert set(tending._actors()) == {"generation[0]", "judge[0]", "rules[0]", "recorder"}
        await tending.leave("generation")
        await tending.leave("never there")
        assert tasks() == everybody[2:]
        assert set(tending._actors()) == {"judge[0]", "rules[0]", "recorder"}
        assert events == []

    drive(tmp_path, {"generation": {"autoscale": BY_LOAD}}, body)


def test_scaling_by_hand_rests_the_autoscaler_of_its_role_for_good(tmp_path: Path) -> None:
    async def body(tending: Tending, events: list[str]) -> None:
        tending.fleet(fleet("generation"), ProbedLoop)
        tending.fleet(fleet("judge"), ProbedLoop)
        await tending.by_hand("judge")
        await tending.by_hand("judge")
        assert events == ["autoscale_paused"]
        assert "autoscale judge" not in tasks() and "autoscale generation" in tasks()
        await tending.leave("judge")
        tending.fleet(fleet("judge"), ProbedLoop)  # a later stage's
        assert "autoscale judge" not in tasks() and "probe judge" in tasks()

    drive(tmp_path, {"generation": {"autoscale": BY_LOAD}, "judge": {"autoscale": BY_LOAD}}, body)


def test_a_defect_of_the_tending_is_an_event_and_no_end(tmp_path: Path) -> None:
    async def body(tending: Tending, events: list[str]) -> None:
        broken = fleet("generation")
        del broken.backlog
        tending.fleet(broken, ProbedLoop)
        [scaler] = [task for task in asyncio.all_tasks() if task.get_name() == "autoscale generation"]
        while not scaler.done():
            await asyncio.sleep(0.05)
        await tending.leave("generation")
        assert events == ["tending_lost"]

    drive(tmp_path, {"generation": {"autoscale": BY_LOAD}}, body)


def test_a_role_that_shares_its_gpu_has_no_autoscaler() -> None:
    with pytest.raises(ConfigError, match=r"no roles\.generation\.autoscale"):
        recipe({"generation": {**SLEEPING, "autoscale": BY_LOAD}, "learner": gpus(0.2)})
