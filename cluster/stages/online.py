"""Stage ``rl``: reinforcement learning of the policy against a mixture of rewards."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from actors.settings import LearnerConfig
from rlhf.algorithms.config import AlgorithmConfig, GrpoConfig
from rlhf.config import StrictModel
from rlhf.errors import ConfigError, LearnerError
from rlhf.loops.online import LoopConfig
from rlhf.rewards.config import RewardParts
from rlhf.runs.names import step_part, table_file, validation_stage
from rlhf.runs.places import join

if TYPE_CHECKING:
    from actors.gang import LearnerGang
    from actors.publisher import BucketPublisher
    from cluster.context import RunContext
    from cluster.stages.recovery import GangLosses
    from rlhf.data.prompts import PromptCursor
    from rlhf.loops.online import OnlineRoles
    from rlhf.protocols import Learner
    from rlhf.rewards.mixture import Mixture
    from rlhf.runs.checkpoint import Checkpoint
    from rlhf.runs.progress import Progress
    from rlhf.runs.saves import StageSaves
    from rlhf.types import GroupHandle, Score


class OnlineStage(StrictModel):
    """Reinforcement learning."""

    kind: Literal["rl"]
    """Tag of this stage."""
    name: str = "rl"
    """Names the stage in the record."""
    learner: LearnerConfig = LearnerConfig()
    """The policy's learner; its model is the policy as the stages before left it."""
    critic: LearnerConfig | None = None
    """The value model's learner, for algorithms with a critic; starts from the reward model where there is one."""
    algorithm: AlgorithmConfig = GrpoConfig()
    """What the advantages are and how they are used."""
    rewards: RewardParts
    """The mixture that is learned from."""
    loop: LoopConfig
    """Steps, batch, staleness."""
    validation_prompts: int = Field(default=0, ge=0)
    """Prompts of ``data.validation`` that are sampled at every evaluation; 0 takes all."""
    select_best: bool = True
    """End with the checkpoint of the best validation score instead of the last one; needs loop.evaluate_every."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk; the best one stays too."""

    @model_validator(mode="after")
    def _stale_rollouts_are_corrected(self) -> OnlineStage:
        # The ratio that is clipped starts from this step's weights, so it cannot see the drift since the drawing.
        if self.loop.max_staleness > 0 and self.algorithm.policy.importance_cap is None:
            raise ValueError("loop.max_staleness above 0 needs algorithm.policy.importance_cap, for example 2.0")
        return self


async def run_online(context: RunContext, stage: OnlineStage) -> dict[str, Any]:
    """Runs the stage, resuming from its last verified checkpoint, and leaves ``RUN/STAGE/policy``.

    A rank that dies takes its gang with it; the whole gang then starts again from that checkpoint, as often as the
    role's ``max_restarts`` allows without a newer one.
    """
    from actors.restarts import ProgressBudget
    from cluster.stages.recovery import GangLosses
    from rlhf.runs import checkpoint

    def checkpointed() -> int:
        return max(checkpoint.steps(context.config.checkpoints.storage(context.run, stage.name)), default=-1)

    budget = ProgressBudget(context.config.roles.learner.resources.max_restarts, checkpointed)
    losses = GangLosses("learner", context.event)
    while True:
        try:
            return await _run_gang(context, stage, losses)
        except LearnerError as error:
            losses.lost(error, restarts_left=budget.left)
            if not budget.take():
                raise


async def _run_gang(context: RunContext, stage: OnlineStage, losses: GangLosses) -> dict[str, Any]:
    """One life of the learners."""
    from actors.publisher import BucketPublisher
    from cluster.fleets import generation_fleet, learner_gang

    version = context.policy.version
    fleet = await generation_fleet(context, context.policy)
    async with AsyncExitStack() as stack:
        gang = await stack.enter_async_context(learner_gang(context, stage))
        losses.began(gang)
        role = context.config.roles.generation
        publisher = BucketPublisher(
            gang,
            fleet,
            context.event,
            version=version,
            bucket_bytes=int(role.bucket_mib * 2**20),
            timeout_s=role.engine.update_timeout_s / 3,
        )
        stack.callback(context.forget_serving)  # from here on the engines hold weights of their own
        run = _OnlineRun(context, stage, gang, publisher, losses)
        return await run.run(stack)


class _OnlineRun:
    """One call of the stage: what the loop's hooks share."""

    def __init__(
        self,
        context: RunContext,
        stage: OnlineStage,
        gang: LearnerGang,
        publisher: BucketPublisher,
        losses: GangLosses | None = None,
    ) -> None:
        from cluster.stages.recovery import GangLosses

        self.context = context
        self.stage = stage
        self.gang = gang
        self.publisher = publisher
        self.losses = losses or GangLosses("learner", context.event)
        self.learners: dict[str, Learner] = {"learner": gang}
        self.checkpoints = context.config.checkpoints.storage(context.run, stage.name)
        self.saves: StageSaves
        self.progress: Progress
        self.rewards: Mixture
        self.validation_rewards: Mixture | None = None
        """The rewards on the scale of the first validation, so that the scores of all checkpoints compare."""
        self.cursor: PromptCursor
        self.roles: OnlineRoles
        self.validation: tuple[int, float] = (-1, 0.0)
        """Updates done at the last validation, and its score."""

    async def run(self, stack: AsyncExitStack) -> dict[str, Any]:
        """Assembles the roles, runs the loop, exports the chosen weights."""
        from cluster.context import StopRequestedError
        from rlhf.loops.online import Hooks, train_online
        from rlhf.runs.progress import Progress

        context, stage = self.context, self.stage
        self.roles = await self._assemble(stack)
        first_step = await self._resume()
        version = context.policy.version
        async with self.roles.gate.hold("publish"):
            await self.publisher.publish(version + first_step)
        self.losses.resumed(first_step)
        self.saves = self._stage_saves()
        with Progress(stage.name, stage.loop.steps, done=first_step) as self.progress:
            context.board.progress[stage.name] = self.progress
            hooks = Hooks(self._log, self._evaluate, self._checkpoint, context.stopping.is_set, context.event)
            async with self.saves:
                done = await train_online(self.roles, stage.loop, hooks, first_step=first_step, first_version=version)
        if done < stage.loop.steps:
            raise StopRequestedError(
                f"stage {stage.name}", found="a signal", needed="more steps", action="Run the command again to go on."
            )
        return await self._finish()

    async def _assemble(self, stack: AsyncExitStack) -> OnlineRoles:
        from actors.roles import FleetGenerator, StageRecorder
        from cluster.fleets import build_rewards, critic_gang, reference_annotator
        from rlhf.algorithms.build import build_algorithm
        from rlhf.data.prompts import PromptCursor
        from rlhf.loops.online import OnlineRoles
        from rlhf.protocols import Annotator

        context, stage = self.context, self.stage
        algorithm = build_algorithm(stage.algorithm)
        annotators: dict[str, Annotator] = {}
        if algorithm.needs_reference and stage.learner.model.adapter is None:
            annotators["reference"] = await reference_annotator(context, context.policy)
        if algorithm.shares_old_log_probs:
            annotators["learner"] = self.gang  # and with its adapter off the reference's, where it has one
        if algorithm.needs_critic:
            critic = await stack.enter_async_context(critic_gang(context, stage))
            annotators["critic"] = critic
            self.learners = {"critic": critic, "learner": self.gang}
            self.losses.began(self.gang, critic)
        self.cursor = PromptCursor(context.prompts("train"), seed=context.config.seed)
        gate = context.timed_gate(stage.name)
        self.rewards = await build_rewards(context, stage.rewards, gate)
        return OnlineRoles(
            prompts=self.cursor,
            generator=FleetGenerator(self.publisher.fleet, context.timings.add_tokens),
            rewards=self.rewards,
            annotators=annotators,
            learners=self.learners,
            publisher=self.publisher,
            recorder=StageRecorder(await context.recorder(), stage.name),
            gate=gate,
        )

    def _stage_saves(self) -> StageSaves:
        from rlhf.runs.saves import StageSaves

        resources = self.context.config.roles.learner.resources
        return StageSaves(
            self.checkpoints,
            self.learners,
            self.context.gate,
            keep=self.stage.keep_checkpoints,
            in_background=self.context.config.checkpoints.writes_in_background(on_gpus=resources.gpus > 0),
            on_saved=self._mark,
            timeout_s=resources.call_timeout_s,
        )

    async def _resume(self) -> int:
        from rlhf.runs import checkpoint

        found = await checkpoint.load_latest_async(self.checkpoints, self._verify, on_event=self._event)
        step = 0
        if found is not None:
            step = found.step
            if step > self.stage.loop.steps:
                raise ConfigError(
                    f"stage {self.stage.name}: loop.steps",
                    found=f"{self.stage.loop.steps}, and a checkpoint of step {step}",
                    needed="no fewer steps than are done",
                    action=f"Set loop.steps to {step} or more, or set another run_dir.",
                )
            self._event("stage_resumed", {"step": step})
            self.cursor.restore(found.state["cursor"])
            self.rewards.restore(found.state["rewards"])
            if (measured_on := found.state.get("validation_rewards")) is not None:
                self.validation_rewards = self.rewards.measuring()
                self.validation_rewards.restore(measured_on)
            self._mark(found)  # a driver that was killed right after its save did not, and no other validates this step
            await self._load(found)
        self.context.metrics.resume(self.stage.name, step)
        self.context.metrics.resume(validation_stage(self.stage.name), step)
        return step

    def _event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self.context.event(kind, stage=self.stage.name, **fields)

    async def _verify(self, found: Checkpoint) -> str:
        """What is wrong with the files of a checkpoint; the ranks read them, each its own."""
        for name, learner in self.learners.items():
            async with self.context.gate.hold(name):
                if fault := await learner.verify(join(found.place, name), found.below(name)):
                    return f"{name}: {fault}"
        return ""

    async def _load(self, verified: Checkpoint) -> None:
        for name, learner in self.learners.items():
            async with self.context.gate.hold(name):
                await learner.load(join(verified.place, name))

    async def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.saves.check()
        self.context.metrics.log(self.stage.name, step + 1, metrics)  # updates done, as checkpoints count them
        self.losses.trained(step + 1, metrics["rollout/completion_tokens"])
        for name in self.learners:
            if num_skipped := metrics.get(f"{name}/skipped"):
                batch = f"rollouts/{table_file(self.stage.name, step_part(step))}"  # kept for a look at it
                self._event("update_skipped", {"step": step + 1, "role": name, "num": num_skipped, "batch": batch})
        self.context.timings.write()
        self.progress.advance(score=metrics.get("rollout/score", float("nan")))

    async def _evaluate(self, num_updates: int) -> None:
        """Samples the validation prompts from the weights just published and scores them with the training rewards.

        Beside the score stands what it may hide: length, diversity, being on topic.

        Raises:
            MissingFeedbackError: Too many scores are missing; the mean of the rest must not choose a checkpoint.
        """
        from rlhf.feedback.missing import check_missing
        from rlhf.loops.rollouts import Rollouts

        stage, version = self.stage, self.context.policy.version + num_updates
        prompts = self.context.prompts("validation")[: stage.validation_prompts or None]
        prompts = [dataclasses.replace(prompt, uid=f"v{num_updates}/{prompt.uid}") for prompt in prompts]
        where = f"{stage.name}'s validation {num_updates}"
        rollouts = Rollouts(
            self.roles.generator,
            self.roles.gate,
            prompts,
            num_samples=1,
            max_missing_fraction=1.0,  # prompts without an answer count below, together with missing scores
            version=version,
            exact=True,
            where=where,
            event=self.context.event,
        )
        await rollouts.draw()
        scores, found = await rollouts.over(functools.partial(self._score_validation, num_updates))
        measures = {f"validation/{name}": value for name, value in found.items()}
        given = [score for siblings in scores for score in siblings]
        errors = [score.error for score in given if score.value is None]
        num_lacking = len(prompts) - len(scores)
        errors += ["the prompt could not be answered"] * num_lacking
        total, where = len(given) + num_lacking, f"scores of {where}"
        check_missing(errors, total, stage.loop.max_missing_fraction, where)
        values = [score.value for score in given if score.value is not None]
        mean = sum(values) / len(values)
        self.validation = (num_updates, mean)
        self.context.metrics.log(validation_stage(stage.name), num_updates, {"validation/score": mean} | measures)

    async def _score_validation(
        self, num_updates: int, groups: list[GroupHandle]
    ) -> tuple[list[tuple[Score, ...]], Mapping[str, float]]:
        """Scores and records the samples of a validation; the scores, and what their texts measure. May be repeated."""
        if self.validation_rewards is None:
            self.validation_rewards = self.rewards.measuring()
        scores = await self.validation_rewards.score(groups)
        scored = [dataclasses.replace(group, scores=given) for group, given in zip(groups, scores, strict=True)]
        card = self.context.config.report_card
        columns = (card.subject_field, card.keywords_field)
        recorder = await self.context.recorder()
        return scores, await recorder.call("record_validation", self.stage.name, num_updates, scored, *columns)

    async def _checkpoint(self, num_updates: int, collected: Mapping[str, Any]) -> None:
        with self.context.timings.phase(f"{self.stage.name}/checkpoint"):
            measured_on = None if self.validation_rewards is None else self.validation_rewards.state()
            measured, score = self.validation
            own = score if measured == num_updates and math.isfinite(score) else None
            state = {**collected, "validation_rewards": measured_on, "validation_score": own}
            await self.saves.save(num_updates, state)

    def _mark(self, saved: Checkpoint) -> None:
        """Makes a checkpoint that now exists the best one where its own validation, if it had one, says so."""
        from rlhf.runs import checkpoint

        if (score := saved.state.get("validation_score")) is not None:
            checkpoint.mark_best(self.checkpoints, saved.step, "validation/score", score)

    async def _finish(self) -> dict[str, Any]:
        """Exports the best checkpoint's weights (or the last) to the stage's folder, whole or not at all.

        Every stage has a folder of its own: a stage that is killed between its export and its record starts again, and
        must not find its own result where it began.
        """
        from rlhf.runs import checkpoint
        from rlhf.runs.files import replacing_folder

        steps = self.stage.loop.steps
        best = checkpoint.open_best(self.checkpoints, on_event=self._event) if self.stage.select_best else None
        if best is not None and best.step != steps:
            if fault := await self._verify(best):
                checkpoint.reject_best(self.checkpoints, best, fault, on_event=self._event)
                best = None
            else:
                await self._load(best)
        target = self.context.run.root / self.stage.name / "policy"
        with replacing_folder(target) as partial:
            async with self.context.gate.hold("learner"):
                await self.gang.export(partial)
        version = self.context.policy.version + (best.step if best is not None else steps)
        return {
            "policy": f"{self.stage.name}/policy",
            "version": version,
            "steps": steps,
            "selected_step": best.step if best else steps,
        }
