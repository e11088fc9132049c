"""Which weights a reinforcement-learning stage leaves: those of the best validation. Only the roles are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.context import Policy, RunContext, StopRequestedError
from cluster.stages.online import OnlineStage, _OnlineRun
from rlhf.config import validate
from rlhf.errors import ConfigError, MissingFeedbackError
from rlhf.loops.gate import BudgetGate
from rlhf.loops.online import OnlineRoles
from rlhf.runs import checkpoint
from rlhf.runs.directory import RunDirectory
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.timings import Timings
from rlhf.types import GroupHandle, Prompt, Score
from tests.fakes import FakeRun

START_VERSION = 5


class CountingLearner:
    """A learner whose weights are the number of its updates."""

    def __init__(self) -> None:
        self.weights = 0

    async def update(self, groups: Sequence[GroupHandle]) -> Mapping[str, float]:
        self.weights += 1
        return {}

    async def save(self, directory: Path) -> None:
        (directory / "weights").write_text(str(self.weights), encoding="utf-8")

    async def load(self, directory: Path) -> None:
        self.weights = int((directory / "weights").read_text(encoding="utf-8"))

    async def export(self, directory: Path) -> None:
        await self.save(directory)


class Rewards:
    """The given score for the validation after as many updates, and any for training."""

    def __init__(self, scores: Mapping[int, float | None]) -> None:
        self._scores = scores

    def measuring(self) -> Rewards:
        return self

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        return [(Score(self._score(group.uid), error="busy"),) * len(group.completion_lengths) for group in groups]

    def _score(self, uid: str) -> float | None:
        return self._scores[int(uid[1 : uid.index("/")])] if uid.startswith("v") else 0.0


class Cursor:
    """The run's prompts, with a place that can be gone back to."""

    def __init__(self, run: FakeRun) -> None:
        self._prompts = run.prompts

    def restore(self, state: Mapping[str, Any]) -> None:
        self._prompts.position = state["position"]


class Recorder:
    """Takes everything and measures nothing."""

    async def call(self, method: str, *args: Any) -> dict[str, float]:
        return {}


class FakeStage(_OnlineRun):
    """The stage with its roles replaced."""

    def __init__(self, context: RunContext, stage: OnlineStage, scores: Mapping[int, float | None]) -> None:
        self.learner: Any = CountingLearner()
        self.fakes = FakeRun(version=START_VERSION)
        publisher: Any = self.fakes
        super().__init__(context, stage, self.learner, publisher)
        self._rewards: Any = Rewards(scores)

    async def _assemble(self, stack: AsyncExitStack) -> OnlineRoles:
        self.cursor: Any = Cursor(self.fakes)
        self.rewards = self._rewards
        return OnlineRoles(
            prompts=self.fakes.prompts,
            generator=self.fakes,
            rewards=self.rewards,
            annotators={},
            learners=self.learners,
            publisher=self.fakes,
            recorder=self.fakes,
            gate=self.context.gate,
        )


def open_stage(folder: Path, steps: int, **changes: Any) -> tuple[RunContext, OnlineStage]:
    document = {
        "name": "x",
        "model": "m",
        "data": {name: {"path": f"{name}.jsonl"} for name in ("train", "validation")},
        "stages": [
            {
                "kind": "rl",
                "rewards": [{"source": "rules", "rules": [{"rule": "finished"}]}],
                "loop": {"steps": steps, "prompts_per_step": 2, "num_samples": 2, "evaluate_every": 1},
                "keep_checkpoints": 1,
                **changes,
            }
        ],
    }
    config = validate(RunConfig, document, "test")
    run = RunDirectory(folder)
    context = RunContext(
        config=config,
        run=run,
        start=Policy(folder, 0),
        policy=Policy(folder, START_VERSION),
        timings=Timings(run.timings),
        metrics=MetricsLogger(run.metrics),
        gate=BudgetGate({}),
        inputs={"validation": [Prompt("p", (), (1,))]},
    )
    recorder: Any = Recorder()
    context._recorder = recorder
    [stage] = config.stages
    assert isinstance(stage, OnlineStage)
    return context, stage


def run_stage(run: FakeStage) -> dict[str, Any]:
    async def body() -> dict[str, Any]:
        async with asyncio.timeout(120), AsyncExitStack() as stack:
            return await run.run(stack)

    return asyncio.run(body())


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.9, 0.4], 2), ([0.9, 0.4, 0.1], 1), ([0.1, 0.4, 0.9], 3), ([-0.9, -0.1, -0.4], 2), ([0.1, 0.9, 0.9], 2)],
    ids=["in the middle", "the first", "the last", "negative", "the earlier of two equals"],
)
def test_what_is_exported_is_the_checkpoint_of_the_best_validation(
    scores: list[float], best: int, tmp_path: Path
) -> None:
    context, stage = open_stage(tmp_path, len(scores))
    results = run_stage(FakeStage(context, stage, dict(enumerate(scores, 1))))
    assert (results["selected_step"], results["steps"], results["version"]) == (best, 3, START_VERSION + best)
    assert (tmp_path / results["policy"] / "weights").read_text(encoding="utf-8") == str(best)


def test_the_last_weights_are_exported_where_the_best_are_not_asked_for(tmp_path: Path) -> None:
    context, stage = open_stage(tmp_path, 3, select_best=False)
    results = run_stage(FakeStage(context, stage, {1: 0.1, 2: 0.9, 3: 0.4}))
    assert (results["selected_step"], results["version"]) == (3, START_VERSION + 3)
    assert (tmp_path / results["policy"] / "weights").read_text(encoding="utf-8") == "3"


def test_the_best_is_that_of_all_drivers_of_a_run(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.4}
    context, stage = open_stage(tmp_path, 4)
    first = FakeStage(context, stage, scores)
    log = first._log

    async def stop_after_three(step: int, metrics: Mapping[str, float]) -> None:
        await log(step, metrics)
        if step == 2:
            context.stopping.set()

    first._log = stop_after_three  # type: ignore[method-assign]
    with pytest.raises(StopRequestedError):
        run_stage(first)
    context, stage = open_stage(tmp_path, 4)
    second = FakeStage(context, stage, scores)
    results = run_stage(second)
    assert len(second.fakes.recorded) == 1, "it went on at step 3"
    assert results["selected_step"] == 2
    assert (tmp_path / results["policy"] / "weights").read_text(encoding="utf-8") == "2"


def test_a_validation_without_its_scores_stops_the_run_and_is_made_again(tmp_path: Path) -> None:
    context, stage = open_stage(tmp_path, 3)
    with pytest.raises(MissingFeedbackError, match="1 of 1 missing.*busy") as caught:
        run_stage(FakeStage(context, stage, {1: 0.1, 2: None, 3: 0.4}))
    assert caught.value.where == "scores of rl's validation 2"
    context, stage = open_stage(tmp_path, 3)
    second = FakeStage(context, stage, {1: 0.1, 2: 0.9, 3: 0.4})
    assert run_stage(second)["selected_step"] == 2
    assert len(second.fakes.recorded) == 2, "it went on at step 1"


class KilledError(Exception):
    """Stands for a SIGKILL: nothing after it is done."""


def test_a_kill_between_a_save_and_its_mark_loses_no_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.4}
    mark_best = checkpoint.mark_best

    def killed_at_two(directory: Path, step: int, *args: Any) -> bool:
        if step == 2:
            raise KilledError
        return mark_best(directory, step, *args)

    context, stage = open_stage(tmp_path, 3)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(checkpoint, "mark_best", killed_at_two)
        run_stage(FakeStage(context, stage, scores))
    context, stage = open_stage(tmp_path, 3)
    second = FakeStage(context, stage, scores)
    results = run_stage(second)
    assert len(second.fakes.recorded) == 1, "it went on at step 2"
    assert results["selected_step"] == 2
    assert (tmp_path / results["policy"] / "weights").read_text(encoding="utf-8") == "2"


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    scores = dict.fromkeys(range(1, 4), 0.5)
    context, stage = open_stage(tmp_path, 3)
    run_stage(FakeStage(context, stage, scores))
    context, stage = open_stage(tmp_path, 2)
    with pytest.raises(ConfigError, match="stage rl: loop.steps: found 2, and a checkpoint of step 3"):
        run_stage(FakeStage(context, stage, scores))
    context, stage = open_stage(tmp_path, 3)
    assert run_stage(FakeStage(context, stage, scores))["steps"] == 3, "nothing was spoilt"
