"""Stage ``evaluate``: held-out prompts before and after training, and the start model's best of n."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.evaluation.report_card import ReportCardConfig

if TYPE_CHECKING:
    from cluster.context import Policy, RunContext
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
    """The baseline: the start model's best of this many by the reward model; 0 leaves it out."""
    report_card: ReportCardConfig = ReportCardConfig()
    """Intervals, signs, and which columns name slice and subject."""


async def run_evaluate(context: RunContext, stage: EvaluateStage) -> dict[str, Any]:
    """Samples both models on ``data.evaluation``, scores them with every instrument and grades them."""
    from cluster.fleets import evaluator

    prompts = context.prompts(stage.split)
    has_reward_model = (context.run.reward_model / "config.json").is_file()
    drawn = max(stage.num_samples, stage.best_of) if has_reward_model else stage.num_samples
    arms = {
        "before": await _sample(context, stage, context.start, prompts, drawn),
        "after": await _sample(context, stage, context.policy, prompts, stage.num_samples),
    }
    measured = {arm: await _measure(context, stage, groups, has_reward_model) for arm, groups in arms.items()}
    worker = await evaluator(context, stage.report_card)
    [report] = await worker.broadcast("evaluate", measured, stage.num_samples)
    return {"eval": report}


async def _sample(
    context: RunContext, stage: EvaluateStage, policy: Policy, prompts: Sequence[Prompt], num_samples: int
) -> list[GroupHandle]:
    from actors.roles import FleetGenerator
    from cluster.fleets import generation_fleet

    fleet = await generation_fleet(context, policy)
    generator = FleetGenerator(fleet, context.timings.add_tokens)
    async with context.timed_gate(stage.name).hold("generation"):
        return await generator.generate(prompts, num_samples=num_samples, version=policy.version, exact=True)


async def _measure(
    context: RunContext, stage: EvaluateStage, groups: Sequence[GroupHandle], has_reward_model: bool
) -> list[GroupHandle]:
    """Adds the judge's margin under the prompt kept for evaluation, the reward score and the start's log-probs."""
    from actors.roles import FleetJudge, FleetScorer
    from cluster.fleets import judge_fleet, reference_annotator, scorer_fleet

    gate = context.timed_gate(stage.name)
    judge = FleetJudge(await judge_fleet(context), "evaluation", context.timings.add_tokens)
    async with gate.hold("judge"):
        margins = await judge.score(groups)
    scores: list[tuple[Score, ...]] = [()] * len(groups)
    if has_reward_model:
        scorer = FleetScorer("reward_model", await scorer_fleet(context), context.timings.add_tokens)
        async with gate.hold("scorer"):
            scores = await scorer.score(groups)
    annotator = await reference_annotator(context, context.start)
    async with gate.hold("reference"):
        annotated = await annotator.annotate(groups)
    return [
        dataclasses.replace(group, scores=_join(judged, scored))
        for group, judged, scored in zip(annotated, margins, scores, strict=True)
    ]


def _join(judged: Sequence[Score], scored: Sequence[Score]) -> tuple[Score, ...]:
    from rlhf.types import Score

    joined = []
    for index, margin in enumerate(judged):
        parts = {} if margin.value is None else {"judge_margin": margin.value}
        if scored and (value := scored[index].value) is not None:
            parts["reward_model"] = value
        joined.append(Score(margin.value, parts, margin.error))
    return tuple(joined)
