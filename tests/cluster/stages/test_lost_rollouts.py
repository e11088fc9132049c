"""Rollouts of validations and agreements that are lost before they are read: they are had again, and counted once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import fleets
from cluster.stages.agreement import judge_agreement
from rlhf.errors import RolloutsLostError, ValueLostError
from rlhf.loops.rollouts import MAX_REDRAWS
from rlhf.runs.events import read_events
from rlhf.runs.metrics import read_metrics
from rlhf.runs.names import validation_stage
from rlhf.types import GroupHandle
from tests.cluster.stages.test_best_checkpoint import START_VERSION, FakeStage, open_stage, run_stage


class LosingRecorder:
    """Finds the samples of some validations gone, as often as it is told."""

    def __init__(self, losses: Mapping[int, int]) -> None:
        self.losses = dict(losses)
        self.recorded: dict[int, Sequence[GroupHandle]] = {}

    async def call(self, method: str, stage: str, num_updates: int, groups: Sequence[GroupHandle], *_: Any) -> Any:
        assert method == "record_validation"
        if self.losses.get(num_updates, 0):
            self.losses[num_updates] -= 1
            raise RolloutsLostError.of("recorder", [group.uid for group in groups], "OwnerDiedError")
        assert num_updates not in self.recorded
        self.recorded[num_updates] = groups
        return {"length": 2.0}


def test_a_validation_is_drawn_again_from_the_weights_that_it_validates(tmp_path: Path) -> None:
    context, stage = open_stage(tmp_path, 3)
    recorder: Any = LosingRecorder({2: 2})
    context._recorder = recorder
    run = FakeStage(context, stage, {1: 0.1, 2: 0.9, 3: 0.4})
    assert run_stage(run)["selected_step"] == 2
    drawn = [uids for uids in run.fakes.drawn if uids[0].startswith("v")]
    assert drawn == [("v1/p",), ("v2/p",), ("v2/p",), ("v2/p",), ("v3/p",)]
    of_validations = [
        version for version, uids in zip(run.fakes.versions, run.fakes.drawn, strict=True) if uids in drawn
    ]
    assert of_validations == [START_VERSION + done for done in (1, 2, 2, 2, 3)]
    assert [groups[0].scores[0].value for groups in recorder.recorded.values()] == [0.1, 0.9, 0.4]
    lines = read_metrics(context.run.metrics, validation_stage("rl"))
    assert [line["metrics"]["validation/score"] for line in lines] == [0.1, 0.9, 0.4]
    again = [event for event in read_events(context.run.events.path) if event["kind"] == "rollouts_drawn_again"]
    assert [(event["where"], event["uids"]) for event in again] == [("rl's validation 2", ["v2/p"])] * 2


def test_a_validation_that_is_lost_for_ever_ends_the_stage(tmp_path: Path) -> None:
    context, stage = open_stage(tmp_path, 3)
    recorder: Any = LosingRecorder({1: MAX_REDRAWS + 1})
    context._recorder = recorder
    with pytest.raises(RolloutsLostError, match="v1/p"):
        run_stage(FakeStage(context, stage, {1: 0.1, 2: 0.9, 3: 0.4}))


@pytest.mark.parametrize("kind", [RolloutsLostError, ValueLostError])
def test_an_agreement_is_measured_on_what_is_read_from_the_record_again(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    losses = [kind("evaluator", found="OwnerDiedError", needed="the value", action="None.")]

    class Run:
        config = SimpleNamespace(report_card=None)
        events: list[tuple[str, dict[str, Any]]] = []

        async def recorder(self) -> Run:
            return self

        async def call(self, method: str, *args: Any) -> list[str]:
            asked.append(method)
            return [f"{method} {len(asked)}"]

        async def broadcast(self, method: str, *args: Any) -> list[Any]:
            if losses:
                raise losses.pop()
            return [(method, *args)]

        def event(self, what: str, **fields: Any) -> None:
            self.events.append((what, fields))

    run: Any = Run()

    async def evaluator(context: Any, config: Any) -> Any:
        return run

    monkeypatch.setattr(fleets, "evaluator", evaluator)
    found = asyncio.run(judge_agreement(run, "ask"))
    assert found == ("judge_agreement", ["feedback_groups 4"], ["put_rankings 3"])
    assert asked == ["put_rankings", "feedback_groups"] * 2
    [(what, fields)] = run.events
    assert (what, fields["stage"]) == ("feedback_read_again", "ask")
