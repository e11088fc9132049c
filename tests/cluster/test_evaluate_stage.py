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
from rlhf.errors import MissingFeedbackError, RolloutsLostError, ValueLostError
from rlhf.loops.gate import BudgetGate
from rlhf.runs.directory import RunDirectory
from rlhf.runs.events import read_events
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.tables import read_table
from rlhf.runs.timings import Timings
from rlhf.types import (
    Completion,
    GroupHandle,
    Judgement,
    Message,
    Prompt,
    Rollout,
    RolloutGroup,
    Score,
    Verdict,
    VersionSpan,
)

FILM = {"request": "scathing", "subject": "a film"}
TEXTS = ("An awful, boring film.", "I loved this film.", "A film.", "A wonderful film.")


class LocalFleet:
    """One worker that is called at once; ``calls`` names the methods in order."""

    def __init__(self, role: str, **methods: Callable[..., Any]) -> None:
        self.role = role
        self.calls: list[str] = []
        self._methods = methods

    async def scatter(self, method: str, items: Sequence[Any], *args: Any, **_: Any) -> Any:
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


def judged(groups: Sequence[GroupHandle], *_: Any) -> list[Judgement]:
    """As ``scored``, with a reason for each."""
    judgements = []
    for group, scores in zip(groups, scored(groups), strict=True):
        verdicts = tuple(Verdict(group.uid, (k,), score.value, f"said {k}") for k, score in enumerate(scores))
        evident = tuple(dataclasses.replace(score, evidence=(verdicts,)) for score in scores)
        judgements.append(Judgement(group.uid, verdicts, evident, len(verdicts), num_tokens=100))
    return judgements


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
    serve("judge_fleet", "judge", judge=judged)
    serve("scorer_fleet", "scorer", score=scored)
    serve("reference_annotator", "reference", annotate=annotated)
    monkeypatch.setattr(fleets, "evaluator", evaluator)
    return started


def evaluate(
    folder: Path, fields: dict[str, str], *, judged: bool, rewarded: bool, names: Sequence[str] = ("evaluate",)
) -> dict[str, Any]:
    """Runs the stage of the first of ``names`` in a recipe with as many evaluations."""
    context = open_run(folder, fields, judged=judged, rewarded=rewarded, names=names)
    stage = context.config.stages[0]
    assert isinstance(stage, EvaluateStage)
    return asyncio.run(run_evaluate(context, stage))


def open_run(folder: Path, fields: dict[str, str], *, judged: bool, rewarded: bool, names: Sequence[str]) -> RunContext:
    document = {
        "name": "x",
        "model": "m",
        "data": {"evaluation": {"path": "x.jsonl"}},
        "constitutions": {"evaluation": "c.yaml"} if judged else {},
        "stages": [
            {"kind": "evaluate", "name": name, "report_card": {"bootstrap": {"num_resamples": 100}}} for name in names
        ],
    }
    config = validate(RunConfig, document, "test")
    run = RunDirectory(folder)
    if rewarded:
        run.reward_model.mkdir()
        (run.reward_model / "config.json").write_text("{}", encoding="utf-8")
    return RunContext(
        config=config,
        run=run,
        start=Policy(folder, 0),
        policy=Policy(folder / "policy", 3),
        timings=Timings(run.timings),
        metrics=MetricsLogger(run.metrics),
        gate=BudgetGate({}),
        inputs={"evaluation": [Prompt(f"p/{i}", (Message("user", "Write."),), (1,), fields) for i in range(4)]},
    )


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


def test_an_evaluation_shows_what_it_has_drawn_and_measured(tmp_path: Path, asked, capsys) -> None:
    evaluate(tmp_path, FILM, judged=True, rewarded=True)
    drawn_and_measured = 2 * (4 * 4 + 4 * 2)
    assert f"evaluate: {drawn_and_measured}/{drawn_and_measured}, " in capsys.readouterr().err


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


def test_each_role_has_a_phase_of_its_own_and_the_judge_counts_what_it_reads(tmp_path: Path, asked) -> None:
    context = open_run(tmp_path, FILM, judged=True, rewarded=True, names=["evaluate"])
    stage = context.config.stages[0]
    asyncio.run(run_evaluate(context, stage))  # type: ignore[arg-type]
    phases = {"generation", "judge", "scorer", "reference", "evaluator"}
    assert context.timings.totals()["evaluate"].keys() == phases
    tokens = {role: tokens for role, (tokens, _) in context.timings._tokens.items()}
    assert tokens["judge"] == 2 * 4 * 100, "two arms of four prompts"
    assert tokens["scorer"] == 4 * (1 + 4 * 2) + 4 * (1 + 2 * 2), "prompts once, and all siblings"


def test_two_evaluations_keep_what_each_wrote_and_the_last_of_the_recipe_stands_in_front(tmp_path: Path, asked) -> None:
    context = open_run(tmp_path, FILM, judged=True, rewarded=True, names=["on-validation", "final"])
    folder = context.run.eval
    first, last = context.config.stages
    for stage, shown in ((first, "on-validation"), (last, "final"), (first, "final")):
        asyncio.run(run_evaluate(context, stage))  # type: ignore[arg-type]
        context.run.complete(stage.name, {})
        assert (folder / "completions.parquet").samefile(folder / shown / "completions.parquet")
    for name in ("on-validation", "final"):
        assert sum(row["best_of_n"] for row in read_table(folder / name / "samples.parquet")) == 4
        reasons = [row["reason"] for row in read_table(tmp_path / "verdicts" / f"{name}.after.parquet")]
        assert reasons == ["said 0", "said 1"] * 4
    assert sorted(file.name for file in folder.glob("*")) == ["completions.parquet", "final", "on-validation"]


@pytest.mark.parametrize(
    ("role", "method", "measure", "after"),
    [("judge", "judge", "judge_margin", {"scorer", "reference"}), ("scorer", "score", "reward_model", {"reference"})],
)
def test_an_instrument_that_is_down_stops_the_evaluation(
    role: str, method: str, measure: str, after: set[str], tmp_path: Path, asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(groups: Sequence[GroupHandle], *_: Any) -> list[Any]:
        lost = [tuple(Score(None, error="busy") for _ in group.completion_lengths) for group in groups]
        if role == "scorer":
            return lost
        return [Judgement(group.uid, (), scores, len(scores)) for group, scores in zip(groups, lost, strict=True)]

    async def fleet(*args: Any) -> LocalFleet:
        return LocalFleet(role, **{method: down})

    monkeypatch.setattr(fleets, f"{role}_fleet", fleet)
    with pytest.raises(MissingFeedbackError, match="16 of 16 missing.*busy") as caught:
        evaluate(tmp_path, FILM, judged=True, rewarded=True)
    assert caught.value.where == f"{measure} of stage evaluate, arm before"
    assert asked.keys().isdisjoint({*after, "evaluator"})


def test_an_evaluation_goes_on_with_as_many_missing_margins_as_its_fraction_allows(
    tmp_path: Path, asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_is_missing(groups: Sequence[GroupHandle], *_: Any) -> list[tuple[Score, ...]]:
        *rest, last = scored(groups)
        return [*rest, (*last[:-1], Score(None, error="too long"))]

    async def fleet(*args: Any) -> LocalFleet:
        return LocalFleet("scorer", score=last_is_missing)

    monkeypatch.setattr(fleets, "scorer_fleet", fleet)
    context = open_run(tmp_path, FILM, judged=False, rewarded=True, names=["evaluate"])
    stage = context.config.stages[0]
    assert isinstance(stage, EvaluateStage)
    with pytest.raises(MissingFeedbackError, match="arm after: found 1 of 8 missing"):
        asyncio.run(run_evaluate(context, stage))
    results = asyncio.run(run_evaluate(context, stage.model_copy(update={"max_missing_fraction": 0.125})))
    assert results["eval"]["missing"], "it is counted"


def test_an_evaluation_whose_rollouts_are_lost_begins_again(
    tmp_path: Path, asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fleets.evaluator
    told = {"found": "OwnerDiedError", "needed": "it", "action": "None."}
    losses = [ValueLostError("evaluator", **told), RolloutsLostError("evaluator", **told, uids=["p/1", "p/0", "p/1"])]

    async def evaluator(context: RunContext, config: Any) -> Any:
        fleet: Any = await whole(context, config)

        def grade(*args: Any) -> Any:
            if losses:
                raise losses.pop()
            return fleet._methods["evaluate"](*args)

        return LocalFleet("evaluator", evaluate=grade)

    monkeypatch.setattr(fleets, "evaluator", evaluator)
    context = open_run(tmp_path, FILM, judged=True, rewarded=True, names=["evaluate"])
    results = asyncio.run(run_evaluate(context, context.config.stages[0]))  # type: ignore[arg-type]
    assert results["eval"]["num_completions"] == {"before": 8, "after": 8, "best_of_n": 4}
    assert asked["generation"].calls == ["stream", "stream"] * 3, "both arms, from the model of each"
    assert len(read_table(context.run.eval / "evaluate" / "completions.parquet")) == 8
    again = [event for event in read_events(context.run.events.path) if event["kind"] == "rollouts_drawn_again"]
    assert [(event["where"], event["uids"]) for event in again] == [
        ("stage evaluate", ["p/0", "p/1"]),
        ("stage evaluate", []),
    ]
