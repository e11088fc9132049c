"""The driver's watch over requests to a running run, with fleets that are not real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.context import Policy, RunContext
from cluster.control import request_scale
from rlhf.config import validate
from rlhf.errors import PlacementError
from rlhf.loops.gate import BudgetGate
from rlhf.runs.directory import RunDirectory
from rlhf.runs.events import read_events
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.timings import Timings

RECIPE = {"name": "x", "model": "m", "stages": [{"kind": "sft", "data": {"path": "x.jsonl"}}]}


class FakeFleet:
    """Notes what it is scaled to, and has room for three replicas."""

    def __init__(self) -> None:
        self.scaled: list[int] = []

    async def scale(self, num_replicas: int) -> None:
        self.scaled.append(num_replicas)
        if num_replicas > 3:
            raise PlacementError("generation", found="no room", needed="4 CPUs", action="Ask for fewer.")


@pytest.fixture
def context(tmp_path: Path) -> Iterator[RunContext]:
    config = validate(RunConfig, RECIPE, "test")
    with RunDirectory.open(tmp_path, config) as run:
        yield RunContext(
            config=config,
            run=run,
            start=Policy(tmp_path, 0),
            policy=Policy(tmp_path, 0),
            timings=Timings(run.timings),
            metrics=MetricsLogger(run.metrics),
            gate=BudgetGate({}),
            inputs={},
        )


async def until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not ready():
            await asyncio.sleep(0.005)


def events(context: RunContext) -> list[dict[str, Any]]:
    return read_events(context.run.events.path)


def test_the_watch_scales_fleets_and_outlives_requests_that_cannot_be_met_or_read(context: RunContext) -> None:
    fleet = FakeFleet()
    context._fleets["generation"] = fleet  # type: ignore[assignment]
    root = context.run.root

    async def ask() -> None:
        watch = asyncio.create_task(context.watch_control(interval_s=0.005))
        request_scale(root, {"generation": 3})
        await until(lambda: fleet.scaled == [3])
        request_scale(root, {"generation": 9})
        await until(lambda: fleet.scaled == [3, 9])
        (root / "control" / "scale.json").write_text("{", encoding="utf-8")
        await until(lambda: sum(event["kind"] == "scaling_failed" for event in events(context)) == 2)
        (root / "control" / "scale.json").write_text('{"generation": 2}', encoding="utf-8")
        await until(lambda: fleet.scaled == [3, 9, 2])
        assert not watch.done()
        watch.cancel()

    asyncio.run(ask())
    told = [(event["kind"], event.get("replicas")) for event in events(context)]
    assert [item for item in told if item[0] == "scaling"] == [("scaling", 3), ("scaling", 9), ("scaling", 2)]
    assert "no room" in next(event["error"] for event in events(context) if event["kind"] == "scaling_failed")
