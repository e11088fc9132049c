"""Stages ``sft``, ``reward`` and ``preference``: one loop and one learner under Ray Train; the objective differs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from actors.settings import LearnerConfig
from rlhf.config import StrictModel
from rlhf.data.supervised import SupervisedDataConfig
from rlhf.loops.offline import OfflineConfig
from rlhf.objectives.config import PreferenceConfig, RankConfig, SupervisedConfig

if TYPE_CHECKING:
    from actors.offline import OfflineJob
    from cluster.config import RunConfig
    from cluster.context import RunContext

STAGE_TIMEOUT_S = 30 * 24 * 3600.0
"""A stage takes as long as its data do. Within it, ranks wait for room for ``start_timeout_s`` and for each other for
``deepspeed.collective_timeout_s``; the driver shows their steps."""


class SupervisedStage(StrictModel):
    """Supervised fine-tuning: on records of a file, or on the best completions of the feedback stage."""

    kind: Literal["sft"]
    """Tag of this stage."""
    name: str = "sft"
    """Names the stage in the record."""
    source: Literal["file", "feedback"] = "file"
    """``file``: chat or instruction records. ``feedback``: rejection sampling, each prompt's best-ranked completion."""
    data: SupervisedDataConfig | None = None
    """With ``source: file``: the file, and what its columns mean."""
    min_score: float | None = None
    """With ``source: feedback``: least judge score of a completion that is learned from; unset takes the best of
    each prompt. It leaves rankings without scores alone: those of people and of pairwise judges."""
    temperature: float | None = Field(default=None, gt=0.0)
    """Logits are divided by it. Unset: ``sampling.temperature`` for what the policy drew itself, which keeps its
    diversity, else 1. A higher one makes the policy surer of what it learns, and its completions more alike."""
    learner: LearnerConfig = LearnerConfig()
    """Starts from the policy as the stages before left it."""
    objective: SupervisedConfig = SupervisedConfig()
    """Negative log-likelihood of the completion."""
    loop: OfflineConfig = OfflineConfig()
    """Epochs and batches."""
    held_out_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the prompts that is kept for evaluation; prompts of one ``subject`` column stay together."""

    @model_validator(mode="after")
    def _data_with_file(self) -> SupervisedStage:
        if (self.source == "file") != (self.data is not None):
            raise ValueError("data goes with source: file, and has to be given there")
        return self


class RewardStage(StrictModel):
    """Reward model from the feedback stage's rankings."""

    kind: Literal["reward"]
    """Tag of this stage."""
    name: str = "reward"
    """Names the stage in the record."""
    learner: LearnerConfig = LearnerConfig()
    """Starts from the run's start model with a fresh scalar head."""
    objective: RankConfig = RankConfig()
    """Rank loss over all ordered pairs of siblings."""
    loop: OfflineConfig = OfflineConfig()
    """Epochs and batches."""
    held_out_fraction: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the prompts whose rankings measure the reward model; prompts of one ``subject`` column stay together."""


class PreferenceStage(StrictModel):
    """Direct preference optimisation on the feedback stage's rankings."""

    kind: Literal["preference"]
    """Tag of this stage."""
    name: str = "preference"
    """Names the stage in the record."""
    learner: LearnerConfig = LearnerConfig()
    """Starts from the policy as the stages before left it, which is also the reference."""
    objective: PreferenceConfig = PreferenceConfig()
    """DPO or one of its family."""
    loop: OfflineConfig = OfflineConfig()
    """Epochs and batches."""
    held_out_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the prompts that is kept for evaluation; prompts of one ``subject`` column stay together."""


OfflineStage = SupervisedStage | RewardStage | PreferenceStage


async def run_offline(context: RunContext, stage: OfflineStage) -> dict[str, Any]:
    """Trains under Ray Train and leaves ``RUN/reward_model`` or ``RUN/policy``."""
    from actors.offline import OfflineJob, read_results
    from cluster.stages.agreement import judge_agreement

    target = context.run.reward_model if stage.kind == "reward" else context.run.root / stage.name / "policy"
    learner = context.at_start(stage.learner) if stage.kind == "reward" else context.at_policy(stage.learner)
    job = OfflineJob(
        kind=stage.kind,
        learner=learner,
        objective=stage.objective,
        loop=stage.loop,
        run_dir=context.run.root,
        stage=stage.name,
        target=target,
        groups=context.run.root / "groups",
        records=stage.data if isinstance(stage, SupervisedStage) else None,
        held_out_fraction=stage.held_out_fraction,
        min_score=stage.min_score if isinstance(stage, SupervisedStage) else None,
        max_sequence_tokens=context.config.max_sequence_tokens,
        seed=context.config.seed,
        threads=context.config.roles.learner.resources.threads,
        temperature=learning_temperature(context.config, stage),
        checkpoints=context.config.checkpoints,
        on_gpus=context.config.roles.learner.resources.gpus > 0,
    )
    async with context.timed_gate(stage.name).hold("learner"), _shown(context, stage.name):
        await _fit(context, job)
    results = read_results(job)
    trained = results.pop("trained")
    context.timings.add_tokens("learner", trained["tokens"], trained["seconds"])
    held_out = results.pop("held_out", ())
    measured = [s.name for s in context.config.stages if s.kind == "feedback" and s.measure_agreement]
    if measured and results.get("pair_accuracy") is not None:
        results["judge_agreement"] = await judge_agreement(context, measured[0], held_out)
    if stage.kind != "reward":
        results["version"] = context.policy.version + 1
        results["policy"] = str(target.relative_to(context.run.root))
    return results


def learning_temperature(config: RunConfig, stage: OfflineStage) -> float:
    """What logits are divided by: as the stage says, or the sampler's temperature for what the policy drew, or 1.

    Learned at 1, completions drawn at 0.8 are sharpened by 0.8 again whenever the policy draws: after two epochs
    SmolLM2-135M had 1.4 nats of entropy, and 1.9 where it had learned at 0.8.
    """
    if not isinstance(stage, SupervisedStage):
        return 1.0
    if stage.temperature is not None:
        return stage.temperature
    drawn = any(s.kind == "feedback" and s.source == "judge" for s in config.stages)
    return config.sampling.temperature if drawn and stage.source == "feedback" else 1.0


@contextlib.asynccontextmanager
async def _shown(context: RunContext, stage: str, interval_s: float = 1.0) -> AsyncIterator[None]:
    """Shows how far the ranks are for the length of a block, from what rank 0 writes down."""
    from rlhf.runs.follow import FollowedProgress

    progress = FollowedProgress(stage, context.run.events.path, context.run.metrics)
    context.board.progress[stage] = progress

    async def follow() -> None:
        try:
            while True:
                await asyncio.sleep(interval_s)
                progress.update()
        finally:  # the last step, too
            progress.update()

    following = asyncio.create_task(follow())
    try:
        yield
    finally:
        following.cancel()
        [ended] = await asyncio.gather(following, return_exceptions=True)
        if isinstance(ended, Exception):  # of the display only; the training went on
            context.event("progress_lost", stage=stage, error=repr(ended))
        progress.close()


async def _fit(context: RunContext, job: OfflineJob) -> None:
    """Trains with Ray Train, which gives the gang start; a gang that was lost starts again.

    A cancellation (a second signal) ends the ranks where they are.
    """
    from actors.calls import await_ref, kill
    from actors.train_driver import TrainDriver
    from cluster.context import StopRequestedError
    from cluster.placement import spawn_here

    role = context.config.roles.learner
    where = f"stage {job.stage}"
    driver = spawn_here(TrainDriver)
    try:
        training = driver.fit.remote(
            job,
            num_ranks=role.ranks,
            cpus=role.resources.cpus,
            gpus=role.resources.gpus,
            strategy=role.resources.strategy,
            labels=role.resources.labels,
            max_restarts=role.resources.max_restarts,
            start_timeout_s=role.resources.start_timeout_s,
        )
        await await_ref(training, timeout_s=STAGE_TIMEOUT_S, where=where)
    finally:
        kill(driver)
    if context.stopping.is_set():
        raise StopRequestedError(where, found="a signal", needed="more steps", action="Run the command again to go on.")
