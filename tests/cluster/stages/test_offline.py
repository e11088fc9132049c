"""At which temperature an offline stage learns, how it shows its steps, and what it says of its speed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.context import Policy, RunContext
from cluster.observer import Board
from cluster.stages import offline
from cluster.stages.offline import SupervisedStage, _shown, learning_temperature, run_offline
from rlhf.config import validate
from rlhf.loops.gate import BudgetGate
from rlhf.runs.directory import RunDirectory
from rlhf.runs.events import read_events
from rlhf.runs.files import write_json
from rlhf.runs.follow import STEPS_KNOWN
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.timings import Timings

JUDGED = {"kind": "feedback"}
PEOPLE = {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}
REJECTION_SAMPLING = {"kind": "sft", "source": "feedback"}


@pytest.mark.parametrize(
    ("feedback", "stage", "expected"),
    [
        (JUDGED, REJECTION_SAMPLING, 0.7),
        (PEOPLE, REJECTION_SAMPLING, 1.0),
        (JUDGED, {**REJECTION_SAMPLING, "temperature": 0.9}, 0.9),
        (JUDGED, {"kind": "sft", "data": {"path": "records.jsonl"}}, 1.0),
        (JUDGED, {"kind": "reward"}, 1.0),
        (JUDGED, {"kind": "preference"}, 1.0),
    ],
)
def test_what_the_policy_drew_is_learned_at_the_temperature_it_was_drawn_at_unless_the_stage_says_otherwise(
    feedback: dict[str, Any], stage: dict[str, Any], expected: float
) -> None:
    document = {
        "name": "tiny",
        "model": "model",
        "sampling": {"temperature": 0.7},
        "data": {"train": {"path": "prompts.jsonl"}},
        "constitutions": {"training": "constitution.yaml"},
        "stages": [feedback, stage],
    }
    config = validate(RunConfig, document, "recipe.yaml")
    assert learning_temperature(config, config.stages[1]) == expected


def test_the_driver_shows_the_steps_that_rank_0_writes_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    context: Any = SimpleNamespace(run=run, event=run.events.record, board=Board())

    async def train() -> None:
        async with _shown(context, "sft", interval_s=0.01):
            await asyncio.sleep(0)  # so that it has begun to look
            run.events.record(STEPS_KNOWN, stage="sft", steps=2, done=0)
            logger = MetricsLogger(run.metrics)
            for step in (1, 2):
                logger.log("sft", step, {"nll": 2.0})

    asyncio.run(train())
    assert capsys.readouterr().err.splitlines()[-1].startswith("sft: 2/2, ")


def test_a_display_that_fails_ends_no_training(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    context: Any = SimpleNamespace(run=run, event=run.events.record, board=Board())

    async def train() -> None:
        async with _shown(context, "sft", interval_s=0.01):
            run.events.record(STEPS_KNOWN, stage="sft")  # without its steps
            await asyncio.sleep(0.05)

    asyncio.run(train())
    assert [event["kind"] for event in read_events(run.events.path)] == [STEPS_KNOWN, "progress_lost"]


def test_what_the_ranks_trained_on_is_the_learners_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"name": "x", "model": "m", "stages": [{"kind": "sft", "data": {"path": "records.jsonl"}}]}
    config = validate(RunConfig, document, "test")
    [stage] = config.stages
    assert isinstance(stage, SupervisedStage)
    run = RunDirectory(tmp_path)
    context = RunContext(
        config=config,
        run=run,
        start=Policy(tmp_path, 0),
        policy=Policy(tmp_path, 0),
        timings=Timings(),
        metrics=MetricsLogger(run.metrics),
        gate=BudgetGate({}),
        inputs={},
    )

    async def trained(context: RunContext, job: Any) -> None:
        folder = run.checkpoints(job.stage)
        folder.mkdir(parents=True, exist_ok=True)
        found = {"num_groups": 3, "num_held_out": 1, "trained": {"tokens": 300, "seconds": 2.0}}
        write_json(folder / "results.json", found)

    monkeypatch.setattr(offline, "_fit", trained)
    results = asyncio.run(run_offline(context, stage))
    assert context.timings.throughput() == {"learner": 150.0}
    assert results == {"num_groups": 3, "num_held_out": 1, "policy": "sft/policy", "version": 1}
