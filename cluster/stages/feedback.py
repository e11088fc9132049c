"""Stage ``feedback``: rankings of siblings, from an AI judge or from people's files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rlhf.config import StrictModel
from rlhf.data.preferences import PreferenceDataConfig
from rlhf.feedback.rankings import RankingConfig
from rlhf.loops.label import LabelConfig

if TYPE_CHECKING:
    from cluster.context import RunContext


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
    measure_agreement: bool = False
    """Report how far the judge agrees with the independent scorer, on these rankings and on the reward stage's held-out
    ones."""

    @model_validator(mode="after")
    def _data_with_file(self) -> FeedbackStage:
        if (self.source == "file") != (self.data is not None):
            raise ValueError("data goes with source: file, and has to be given there")
        told = [key for key in ("num_prompts", "measure_agreement") if getattr(self, key)]
        if self.source == "file" and told:
            raise ValueError(f"no {told[0]} with source: file, where no judge is asked")
        return self


async def run_feedback(context: RunContext, stage: FeedbackStage) -> dict[str, Any]:
    """Leaves ``RUN/rankings`` and the training groups of the offline stages."""
    if stage.source == "file":
        return await _from_file(context, stage)
    return await _from_judge(context, stage)


async def _from_file(context: RunContext, stage: FeedbackStage) -> dict[str, Any]:
    recorder = await context.recorder()
    num_rankings = await recorder.call(
        "import_people_feedback", stage.name, stage.data, context.start.path, context.config.max_sequence_tokens
    )
    return {"source": "people", "num_rankings": num_rankings}


async def _from_judge(context: RunContext, stage: FeedbackStage) -> dict[str, Any]:
    from actors.roles import FleetGenerator, StageRecorder
    from cluster.fleets import generation_fleet, judge_fleet, training_judge
    from cluster.stages.agreement import judge_agreement
    from rlhf.loops.label import LabelRoles, label
    from rlhf.runs.progress import Progress

    prompts = context.prompts("train")[: stage.num_prompts or None]
    fleet = await generation_fleet(context, context.policy)
    judge = training_judge(context, await judge_fleet(context))
    recorder = await context.recorder()
    roles = LabelRoles(
        generator=FleetGenerator(fleet, context.timings.add_tokens),
        judge=judge,
        recorder=StageRecorder(recorder, stage.name, stage.ranking),
        gate=context.timed_gate(stage.name),
        event=context.event,
    )
    with Progress(stage.name, len(prompts)) as bar:
        context.board.progress[stage.name] = bar
        await label(roles, stage.loop, prompts, version=context.policy.version, progress=bar.advance)
    results: dict[str, Any] = {"source": "judge", **await recorder.call("feedback_counts", stage.name)}
    if stage.measure_agreement:
        results["judge_agreement"] = await judge_agreement(context, stage.name)
    return results
