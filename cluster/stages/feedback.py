"""Stage ``feedback``: rankings of siblings, from an AI judge or from people's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rlhf.config import StrictModel
from rlhf.data.preferences import PreferenceDataConfig
from rlhf.feedback.rankings import RankingConfig
from rlhf.loops.label import LabelConfig

if TYPE_CHECKING:
    from cluster.context import RunContext
    from rlhf.protocols import Judge
    from rlhf.types import GroupHandle, Verdict


class FeedbackStage(StrictModel):
    """Where rankings come from."""

    kind: Literal["feedback"]
    """Tag of this stage."""
    name: str = "feedback"
    """Names the stage in the record."""
    source: Literal["judge", "file"] = "judge"
    """``judge``: an AI judge ranks the policy's siblings. ``file``: people's pairs, ranked lists or ratings."""
    data: PreferenceDataConfig | None = None
    """With ``source: file``: the file, and what its columns mean."""
    num_prompts: int = Field(default=0, ge=0)
    """With ``source: judge``: how many of ``data.train`` are labelled; 0 takes all."""
    loop: LabelConfig = LabelConfig()
    """Siblings per prompt and chunks."""
    ranking: RankingConfig = RankingConfig()
    """How verdicts become an order."""
    shuffle_verdicts: bool = False
    """A null arm: deals each prompt's verdicts out at random. What is learned from them must not improve anything."""
    measure_agreement: bool = False
    """Report how far the judge agrees with the independent scorer, on these rankings and on the reward stage's held-out
    ones."""

    @model_validator(mode="after")
    def _data_with_file(self) -> FeedbackStage:
        if (self.source == "file") != (self.data is not None):
            raise ValueError("data goes with source: file, and has to be given there")
        if self.measure_agreement and self.source == "file":
            raise ValueError("measure_agreement goes with source: judge")
        return self


async def run_feedback(context: RunContext, stage: FeedbackStage) -> dict[str, Any]:
    """Leaves ``RUN/rankings`` and the training groups of the offline stages."""
    if stage.source == "file":
        return await _from_file(context, stage)
    return await _from_judge(context, stage)


async def _from_file(context: RunContext, stage: FeedbackStage) -> dict[str, Any]:
    recorder = await context.recorder()
    num_rankings = await recorder.call(
        "import_people_feedback", stage.data, context.start.path, context.config.max_sequence_tokens
    )
    return {"source": "people", "num_rankings": num_rankings}


async def _from_judge(context: RunContext, stage: FeedbackStage) -> dict[str, Any]:
    from actors.roles import FleetGenerator, FleetJudge
    from cluster.fleets import generation_fleet, judge_fleet
    from cluster.stages.agreement import judge_agreement
    from rlhf.feedback.rankings import ranking_from_verdicts
    from rlhf.loops.label import LabelRoles, label
    from rlhf.runs.progress import Progress
    from rlhf.types import Ranking

    def rank(uid: str, num_samples: int, verdicts: Sequence[Verdict]) -> Ranking:
        return ranking_from_verdicts(uid, num_samples, verdicts, stage.ranking, source="judge")

    prompts = context.prompts("train")[: stage.num_prompts or None]
    fleet = await generation_fleet(context, context.policy)
    judge: Judge = FleetJudge(await judge_fleet(context), "training", context.timings.add_tokens)
    recorder = await context.recorder()
    roles = LabelRoles(
        generator=FleetGenerator(fleet, context.timings.add_tokens),
        judge=ShuffledJudge(judge, context.config.seed) if stage.shuffle_verdicts else judge,
        recorder=recorder,
        gate=context.timed_gate(stage.name),
        rank=rank,
    )
    with Progress(stage.name, len(prompts)) as bar:
        await label(roles, stage.loop, prompts, version=context.policy.version, progress=bar.advance)
    results: dict[str, Any] = {"source": "judge", **await recorder.call("feedback_counts")}
    if stage.measure_agreement:
        results["judge_agreement"] = await judge_agreement(context)
    return results


class ShuffledJudge:
    """Deals the values of each prompt's verdicts out at random: what is learned from them must not improve anything."""

    def __init__(self, judge: Judge, seed: int) -> None:
        self._judge = judge
        self._seed = seed

    async def judge(self, groups: Sequence[GroupHandle]) -> list[tuple[Verdict, ...]]:
        """The inner judge's verdicts with their values dealt out anew."""
        import dataclasses
        import random

        shuffled = []
        for verdicts in await self._judge.judge(groups):
            values = [(verdict.value, verdict.error) for verdict in verdicts]
            random.Random(f"{self._seed}/{verdicts[0].uid}").shuffle(values)
            shuffled.append(
                tuple(
                    dataclasses.replace(verdict, value=value, error=error, reason=f"shuffled; was: {verdict.reason}")
                    for verdict, (value, error) in zip(verdicts, values, strict=True)
                )
            )
        return shuffled
