"""The evaluation stage with workers in the process itself: whom it asks, and what its report then holds."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.evaluator import EvaluatorWorker
from actors.roles import FleetAnnotator
from actors.store import LocalStore
from cluster import fleets
from cluster.config import RunConfig
from cluster.context import Policy, RunContext
from cluster.stages.evaluate import EvaluateStage, run_evaluate
from rlhf.config import validate
from rlhf.loops.gate import BudgetGate
from rlhf.runs.directory import RunDirectory
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.timings import Timings
from rlhf.types import Completion, GroupHandle, Message, Prompt, Rollout, RolloutGroup, Score, VersionSpan

FILM = {"request": "scathing", "subject": "a film"}
TEXTS = ("An awful, boring film.", "I loved this film.", "A film.", "A wonderful film.")


class LocalFleet:
    """One worker that is called at once; ``calls`` names the methods in order."""

    def __init__(self, role: str, **methods: Callable[..., Any]) -> None:
        self.role = role
        self.calls: list[str] = []
        self._methods = methods

    async def scatter(self, method: str, items: Sequence[Any], *args: Any) -> Any:
        self.calls.append(method)
        return self._methods[method](items, *args)

    scatter_stream = scatter

    async def broadcast(self, method: str, *args: Any) -> list[Any]:
        self.calls.append(method)
        return [self._methods[method](*args)]


def drawn(prompts: Sequence[Prompt], num_samples: int, version: int, *_: Any) -> list[GroupHandle]:
    ids, own = np.array([9, 10], np.int32), np.array([-1.0, -2.0], np.float32)
    groups = []
    for prompt in prompts:
        completions = [
            Completion(ids, own, TEXTS[k], "stop", (VersionSpan(version, 0, 2),)) for k in range(num_samples)
        ]
        payload = RolloutGroup(prompt, tuple(map(Rollout, completions)))
        groups.append(GroupHandle(prompt.uid, payload, 1, (2,) * num_samples, (version, version)))
    return groups


def annotated(groups: Sequence[GroupHandle]) -> list[GroupHandle]:
    start = np.array([-1.0, -2.0], np.float32)
    return [
        dataclasses.replace(group, annotations={"reference_log_probs": (start,) * len(group.completion_lengths)})
        for group in groups
    ]


def scored(groups: Sequence[GroupHandle], *_: Any) -> list[tuple[Score, ...]]:
    """Later siblings are better."""
    return [tuple(Score(float(k)) for k in range(len(group.completion_lengths))) for group in groups]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, LocalFleet]:
    """The fleets by role, once the stage has asked for them."""
    started: dict[str, LocalFleet] = {}

    def serve(name: str, role: str, **methods: Callable[..., Any]) -> None:
        async def fleet(*args: Any) -> Any:
            started.setdefault(role, LocalFleet(role, **methods))
            found = started[role]
            return FleetAnnotator(found, lambda *_: None) if role == "reference" else found  # type: ignore[arg-type]

        monkeypatch.setattr(fleets, name, fleet)

    async def evaluator(context: RunContext, config: Any) -> Any:
        worker = EvaluatorWorker(tmp_path, LocalStore(), config)
        started["evaluator"] = LocalFleet("evaluator", evaluate=worker.evaluate)
        return started["evaluator"]

    serve("generation_fleet", "generation", stream=drawn)
    serve("judge_fleet", "judge", score=scored)
    serve("scorer_fleet", "scorer", score=scored)
    serve("reference_annotator", "reference", annotate=annotated)
    monkeypatch.setattr(fleets, "evaluator", evaluator)
    return started


def evaluate(folder: Path, fields: dict[str, str], *, judged: bool, rewarded: bool) -> dict[str, Any]:
    document = {
        "name": "x",
        "model": "m",
        "data": {"evaluation": {"path": "x.jsonl"}},
        "constitutions": {"evaluation": "c.yaml"} if judged else {},
        "stages": [{"kind": "evaluate", "report_card": {"bootstrap": {"num_resamples": 100}}}],
    }
    config = validate(RunConfig, document, "test")
    run = RunDirectory(folder)
    if rewarded:
        run.reward_model.mkdir()
        (run.reward_model / "config.json").write_text("{}", encoding="utf-8")
    context = RunContext(
        config=config,
        run=run,
        start=Policy(folder, 0),
        policy=Policy(folder / "policy", 3),
        timings=Timings(run.timings),
        metrics=MetricsLogger(run.metrics),
        gate=BudgetGate({}),
        inputs={"evaluation": [Prompt(f"p/{i}", (Message("user", "Write."),), (1,), fields) for i in range(4)]},
    )
    [stage] = config.stages
    assert isinstance(stage, EvaluateStage)
    return asyncio.run(run_evaluate(context, stage))


def test_with_judge_reward_model_and_columns_every_instrument_is_asked(tmp_path: Path, asked) -> None:
    results = evaluate(tmp_path, FILM, judged=True, rewarded=True)
    assert asked.keys() == {"generation", "judge", "scorer", "reference", "evaluator"}
    report = results["eval"]
    assert results["notes"] == []
    assert report["num_completions"] == {"before": 8, "after": 8, "best_of_n": 4}
    assert report["best_of_n"]["reward_model"]["mean"] == 3.0, "the best of the four that were drawn"
    assert report["after"]["judge_margin"]["mean"] == 0.5
    assert report["after"]["follows_request"]["mean"] == 0.5
    assert report["win_rate"]["mean"] == 0.5 and report["worst_slice"] == "scathing" and report["missing"] == {}


def test_without_them_nobody_is_asked_in_vain_and_the_rest_is_measured(tmp_path: Path, asked) -> None:
    results = evaluate(tmp_path, {}, judged=False, rewarded=False)
    assert asked.keys() == {"generation", "reference", "evaluator"}
    report = results["eval"]
    assert report["num_completions"] == {"before": 8, "after": 8, "best_of_n": 0}
    rest = {"kl_per_token", "nll_start", "length", "words", "finished", "repetition", "distinct_2"}
    assert set(report["before"]) == set(report["after"]) == rest
    assert (report["win_rate"], report["slices"], report["worst_slice"], report["missing"]) == (None, {}, "", {})
    told = " ".join(results["notes"])
    assert all(name in told for name in ("judge_margin", "win_rate", "best_of_n", "follows_request", "on_topic"))


def test_a_judge_alone_gives_margins_and_no_slices(tmp_path: Path, asked) -> None:
    report = evaluate(tmp_path, {}, judged=True, rewarded=False)["eval"]
    assert "scorer" not in asked
    assert report["win_rate"]["mean"] == 0.5 and report["slices"] == {}
    assert "judge_margin" in report["after"] and "follows_request" not in report["after"]
