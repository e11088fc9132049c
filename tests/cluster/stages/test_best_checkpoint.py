"""Which weights a reinforcement-learning stage leaves: those of the best validation. Only the roles are fakes."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.context import Policy, RunContext, StopRequestedError
from cluster.stages.online import OnlineStage, _OnlineRun
from rlhf.config import validate
from rlhf.errors import CheckpointError, ConfigError, MissingFeedbackError
from rlhf.loops.gate import BudgetGate
from rlhf.loops.online import OnlineRoles
from rlhf.runs import checkpoint
from rlhf.runs.directory import RunDirectory
from rlhf.runs.events import read_events
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.places import FileEntry, SaveStatus, fetch_file, write_file
from rlhf.runs.timings import Timings
from rlhf.types import GroupHandle, Prompt, Score
from tests.fakes import FakeRun

START_VERSION = 5


class CountingLearner:
    """A learner whose weights are the number of its updates; written in the background they take a moment."""

    def __init__(self) -> None:
        self.weights = 0
        self.writing: tuple[str, int, int] | None = None
        self.fails_at: int | None = None
        self.verified = b""

    async def update(self, groups: Sequence[GroupHandle]) -> Mapping[str, float]:
        self.weights += 1
        return {}

    async def save(self, place: str) -> Mapping[str, FileEntry]:
        return {"weights": write_file(place, "weights", [str(self.weights).encode()])}

    async def begin_save(self, place: str) -> None:
        assert self.writing is None, "one at a time"
        self.writing = (place, self.weights, 2)

    async def saved(self, wait_s: float = 0.0) -> SaveStatus:
        assert self.writing is not None
        place, weights, answers = self.writing
        if answers:
            self.writing = (place, weights, answers - 1)
            return SaveStatus()
        self.writing = None
        if weights == self.fails_at:
            return SaveStatus(fault="No space left on device")
        return SaveStatus({"weights": write_file(place, "weights", [str(weights).encode()])})

    async def verify(self, place: str, files: Mapping[str, FileEntry]) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                self.verified = fetch_file(place, "weights", files["weights"], Path(scratch)).read_bytes()
            except CheckpointError as error:
                return error.found
        return ""

    async def load(self, place: str) -> None:
        self.weights = int(self.verified)

    async def export(self, directory: Path) -> None:
        await self.save(str(directory))


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


def open_stage(
    folder: Path, steps: int, checkpoints: Mapping[str, Any] | None = None, **changes: Any
) -> tuple[RunContext, OnlineStage]:
    document = {
        "checkpoints": dict(checkpoints or {}),
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


WAYS = {
    "at once": {"in_background": False},
    "in the background": {"in_background": True},
    "to a URL": {"in_background": True, "target": "URL"},
}


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.9, 0.4], 2), ([0.9, 0.4, 0.1], 1), ([0.1, 0.4, 0.9], 3), ([-0.9, -0.1, -0.4], 2), ([0.1, 0.9, 0.9], 2)],
    ids=["in the middle", "the first", "the last", "negative", "the earlier of two equals"],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_exported_is_the_checkpoint_of_the_best_validation(
    scores: list[float], best: int, way: str, tmp_path: Path
) -> None:
    checkpoints = WAYS[way] | ({"target": f"file://{tmp_path}/store"} if "target" in WAYS[way] else {})
    context, stage = open_stage(tmp_path, len(scores), checkpoints)
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


def test_a_write_that_fails_in_the_background_ends_the_stage_and_costs_no_earlier_checkpoint(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.4, 4: 0.5}
    context, stage = open_stage(tmp_path, 4, {"in_background": True})
    first = FakeStage(context, stage, scores)
    first.learner.fails_at = 2
    with pytest.raises(CheckpointError, match="learner: No space left on device"):
        run_stage(first)
    assert checkpoint.steps(first.checkpoints) == [1]
    assert not list((tmp_path / "checkpoints" / "rl").glob(".tmp*"))
    context, stage = open_stage(tmp_path, 4, {"in_background": True})
    assert run_stage(FakeStage(context, stage, scores))["selected_step"] == 2


def test_a_stop_waits_for_what_is_being_written(tmp_path: Path) -> None:
    context, stage = open_stage(tmp_path, 4, {"in_background": True})
    run = FakeStage(context, stage, {1: 0.1, 2: 0.9})
    log = run._log

    async def stop_after_two(step: int, metrics: Mapping[str, float]) -> None:
        await log(step, metrics)
        if step == 1:
            context.stopping.set()

    run._log = stop_after_two  # type: ignore[method-assign]
    with pytest.raises(StopRequestedError):
        run_stage(run)
    found = checkpoint.load_latest(run.checkpoints)
    assert found is not None and found.step == 2 and found.state["validation_score"] == 0.9
    assert json.loads((tmp_path / "checkpoints" / "rl" / "BEST").read_text())["step"] == 2


@pytest.mark.parametrize("step", [1, 2])
def test_a_damaged_checkpoint_is_found_by_the_learner_that_reads_it(tmp_path: Path, step: int) -> None:
    """The newest one, from which the stage would go on; and the best one, which it would end with."""
    scores = {1: 0.9, 2: 0.1, 3: 0.2}
    context, stage = open_stage(tmp_path, 3, keep_checkpoints=2)
    run = FakeStage(context, stage, scores)
    log = run._log

    async def stop_after_two(number: int, metrics: Mapping[str, float]) -> None:
        await log(number, metrics)
        if number == 1:
            context.stopping.set()

    run._log = stop_after_two  # type: ignore[method-assign]
    with pytest.raises(StopRequestedError):
        run_stage(run)
    (tmp_path / "checkpoints" / "rl" / f"step_{step}" / "learner" / "weights").write_text("7")
    context, stage = open_stage(tmp_path, 3, keep_checkpoints=2)
    results = run_stage(FakeStage(context, stage, scores))
    assert results["selected_step"] == (3 if step == 1 else 1)
    [rejected] = [e for e in read_events(context.run.events.path) if e["kind"] == "checkpoint_rejected"]
    assert rejected["found"] == "learner: weights with altered bytes"
    assert (tmp_path / "checkpoints" / "rl" / f"bad-step_{step}").is_dir()


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    scores = dict.fromkeys(range(1, 4), 0.5)
    context, stage = open_stage(tmp_path, 3)
    run_stage(FakeStage(context, stage, scores))
    context, stage = open_stage(tmp_path, 2)
    with pytest.raises(ConfigError, match="stage rl: loop.steps: found 2, and a checkpoint of step 3"):
        run_stage(FakeStage(context, stage, scores))
    context, stage = open_stage(tmp_path, 3)
    assert run_stage(FakeStage(context, stage, scores))["steps"] == 3, "nothing was spoilt"
