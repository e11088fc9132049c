"""Stage ``evaluate``: held-out prompts before and after training, and the start model's best of n."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.evaluation.report_card import ReportCardConfig

if TYPE_CHECKING:
    from cluster.context import Policy, RunContext
    from rlhf.errors import RlhfError
    from rlhf.evaluation.instruments import Instruments
    from rlhf.types import GroupHandle, Prompt, Score


class EvaluateStage(StrictModel):
    """Evaluation before and after."""

    kind: Literal["evaluate"]
    """Tag of this stage."""
    name: str = "evaluate"
    """Names the stage in the record."""
    split: Literal["evaluation", "validation"] = "evaluation"
    """The prompts: ``validation`` while a recipe is being chosen, so that ``evaluation`` is seen once, at the end."""
    num_samples: int = Field(default=2, ge=1)
    """Completions per prompt and arm."""
    best_of: int = Field(default=4, ge=0)
    """The baseline: the start model's best of this many by the reward model; 0, or no reward model, leaves it out."""
    max_missing_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Above this fraction of missing margins or reward-model scores in an arm the run stops."""
    report_card: ReportCardConfig = ReportCardConfig()
    """Intervals, signs, and which columns name slice and subject."""


async def run_evaluate(context: RunContext, stage: EvaluateStage) -> dict[str, Any]:
    """Samples both models on ``data.evaluation``, scores them with every instrument and grades them.

    Where rollouts are lost meanwhile it is done again: what an owner takes with it is most of them.
    """
    from rlhf.evaluation.instruments import choose_instruments
    from rlhf.loops.rollouts import repeated

    prompts = context.prompts(stage.split)
    instruments = choose_instruments(
        prompts,
        stage.report_card,
        judged=context.config.constitutions.evaluation is not None,
        has_reward_model=(context.run.reward_model / "config.json").is_file(),
        where=f"stage {stage.name}",
    )

    def lost(error: RlhfError) -> None:
        uids = sorted(set(getattr(error, "uids", ())))
        context.event("rollouts_drawn_again", where=f"stage {stage.name}", uids=uids, error=str(error))

    report = await repeated(lambda: _evaluate(context, stage, prompts, instruments), lost)
    _show(context, stage)
    return {"eval": report, "notes": instruments.notes()}


async def _evaluate(
    context: RunContext, stage: EvaluateStage, prompts: Sequence[Prompt], instruments: Instruments
) -> dict[str, Any]:
    """Draws, measures and grades; its tables are replaced where it is repeated."""
    from cluster.fleets import evaluator
    from rlhf.runs.progress import Progress

    best_of = stage.best_of if "reward_model" in instruments else 0
    arms = {"before": (context.start, max(stage.num_samples, best_of)), "after": (context.policy, stage.num_samples)}
    sampled: dict[str, list[GroupHandle]] = {}
    measured: dict[str, list[GroupHandle]] = {}
    num_completions = len(prompts) * sum(num_samples for _, num_samples in arms.values())
    with Progress(stage.name, 2 * num_completions) as bar:  # each completion is drawn and measured
        context.board.progress[stage.name] = bar
        for arm, (policy, num_samples) in arms.items():
            sampled[arm] = await _sample(context, stage, policy, prompts, num_samples)
            bar.advance(len(prompts) * num_samples)
        answered = set.intersection(*({group.uid for group in groups} for groups in sampled.values()))
        sampled = {arm: [group for group in groups if group.uid in answered] for arm, groups in sampled.items()}
        for arm, (_, num_samples) in arms.items():
            measured[arm] = await _measure(context, stage, arm, sampled[arm], instruments)
            bar.advance(len(prompts) * num_samples)
    worker = await evaluator(context, stage.report_card)
    async with context.timed_gate(stage.name).hold("evaluator"):
        [report] = await worker.broadcast("evaluate", stage.name, measured, stage.num_samples, best_of, instruments)
    found: dict[str, Any] = report
    return found


def _show(context: RunContext, stage: EvaluateStage) -> None:
    """Makes ``eval/completions.parquet`` that of the last evaluation of the recipe, which the summary is made of."""
    from rlhf.runs.files import share_file

    evaluations = [other.name for other in context.config.stages if other.kind == "evaluate"]
    later = evaluations[evaluations.index(stage.name) + 1 :]
    if not any(context.run.is_complete(name) for name in later):
        share_file(context.run.eval / stage.name / "completions.parquet", context.run.eval / "completions.parquet")


async def _sample(
    context: RunContext, stage: EvaluateStage, policy: Policy, prompts: Sequence[Prompt], num_samples: int
) -> list[GroupHandle]:
    from actors.roles import FleetGenerator
    from cluster.fleets import generation_fleet
    from rlhf.feedback.missing import check_missing

    fleet = await generation_fleet(context, policy)
    generator = FleetGenerator(fleet, context.timings.add_tokens)
    async with context.timed_gate(stage.name).hold("generation"):
        groups = await generator.generate(prompts, num_samples=num_samples, version=policy.version, exact=True)
    lacking = ["the prompt could not be answered"] * (len(prompts) - len(groups))
    check_missing(lacking, len(prompts), stage.max_missing_fraction, f"completions of stage {stage.name}")
    return groups


async def _measure(
    context: RunContext, stage: EvaluateStage, arm: str, groups: Sequence[GroupHandle], instruments: Instruments
) -> list[GroupHandle]:
    """Adds the start's log-probs and, where they measure, the judge's margin and the reward model's score.

    Raises:
        MissingFeedbackError: Too many margins or scores of the arm are missing; the stage is then still to be done.
    """
    from actors.roles import FleetJudge, FleetScorer
    from cluster.fleets import judge_fleet, reference_annotator, scorer_fleet

    gate = context.timed_gate(stage.name)
    scored: dict[str, list[tuple[Score, ...]]] = {}
    if "judge" in instruments:
        judge = FleetJudge(await judge_fleet(context), "evaluation", context.timings.add_tokens)
        async with gate.hold("judge"):
            scored["judge_margin"] = await judge.score(groups)
        _check_missing(stage, arm, "judge_margin", scored["judge_margin"])
    if "reward_model" in instruments:
        scorer = FleetScorer("reward_model", await scorer_fleet(context), context.timings.add_tokens)
        async with gate.hold("scorer"):
            scored["reward_model"] = await scorer.score(groups)
        _check_missing(stage, arm, "reward_model", scored["reward_model"])
    annotator = await reference_annotator(context, context.start)
    async with gate.hold("reference"):
        annotated = await annotator.annotate(groups)
    return [
        dataclasses.replace(group, scores=_join({name: scores[i] for name, scores in scored.items()}, group))
        for i, group in enumerate(annotated)
    ]


def _check_missing(stage: EvaluateStage, arm: str, measure: str, scores: Sequence[tuple[Score, ...]]) -> None:
    from rlhf.feedback.missing import check_missing

    given = [score for siblings in scores for score in siblings]
    errors = [score.error for score in given if score.value is None]
    check_missing(errors, len(given), stage.max_missing_fraction, f"{measure} of stage {stage.name}, arm {arm}")


def _join(scored: Mapping[str, Sequence[Score]], group: GroupHandle) -> tuple[Score, ...]:
    """One score per sibling that holds every measure that could be had as a component."""
    from rlhf.types import Score

    joined = []
    for sibling in range(len(group.completion_lengths)):
        values = {name: scores[sibling].value for name, scores in scored.items()}
        parts = {name: value for name, value in values.items() if value is not None}
        evidence = tuple(handle for scores in scored.values() for handle in scores[sibling].evidence)
        joined.append(Score(None, parts, "an evaluation has measures and no score", evidence))
    return tuple(joined)
