"""The online loop: prompts -> rollouts -> scores -> update -> publication, on a page.

Synchronous, one-step-ahead and colocated runs differ in ``max_staleness`` and in the injected gate; PPO and GRPO differ
in which annotators and learners are injected. No Ray in here: the roles are seams (``rlhf.protocols``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.loops.buffer import StepBatch, StepBuffer
from rlhf.loops.rollouts import Event, StepRollouts
from rlhf.protocols import Annotator, Generator, Learner, PhaseGate, Recorder, RewardSource, WeightPublisher
from rlhf.types import GroupHandle, Prompt


class LoopConfig(StrictModel):
    """How the online loop steps."""

    steps: int = Field(ge=1)
    """Updates in all."""
    prompts_per_step: int = Field(ge=1)
    """Prompts of one update; the batch is this times ``num_samples``."""
    num_samples: int = Field(ge=1)
    """Siblings per prompt (K)."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """0: synchronous. 1: the next step is generated while this one trains, which needs
    ``algorithm.policy.importance_cap``."""
    max_missing_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Above this fraction of missing scores in a step or a validation the run stops; and of prompts in a step that
    could not be answered."""
    evaluate_every: int = Field(default=0, ge=0)
    """Updates between validations, each with a checkpoint, so that the best can be kept; 0 never."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Updates between checkpoints; an evaluation, a stop and the end make one too."""
    step_timeout_s: float = Field(default=3600.0, gt=0)
    """Longest wait of one side of the loop for the other."""


class PromptSource(Protocol):
    """A resumable stream of prompts; see ``rlhf.data.prompts.PromptCursor``."""

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        """The next prompts; each exactly once an epoch."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Where the stream stands, as plain JSON."""
        ...


class StepRewards(RewardSource, Protocol):
    """A reward source that may carry something from step to step; see ``rlhf.rewards.mixture.Mixture``."""

    def state(self) -> Mapping[str, Any]:
        """What the scores so far have left behind, as plain JSON."""
        ...


@dataclass(frozen=True, slots=True)
class OnlineRoles:
    """The roles of one run. ``annotators`` and ``learners`` act in order; a critic learns before the policy."""

    prompts: PromptSource
    generator: Generator
    rewards: StepRewards
    annotators: Mapping[str, Annotator]
    learners: Mapping[str, Learner]
    publisher: WeightPublisher
    recorder: Recorder
    gate: PhaseGate


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the runner does: all but ``event`` at a step's end, when weights and record agree.

    ``checkpoint`` gets the collector's state behind that step: ``{"cursor": ..., "rewards": ...}``.
    """

    log: Callable[[int, Mapping[str, float]], Awaitable[None]]
    evaluate: Callable[[int], Awaitable[None]]
    checkpoint: Callable[[int, Mapping[str, Any]], Awaitable[None]]
    should_stop: Callable[[], bool]
    event: Event


@dataclass(frozen=True, slots=True)
class Span:
    """The steps of one call of the loop, and the weight version that counts as step 0's."""

    steps: range
    first_version: int


async def collect(roles: OnlineRoles, config: LoopConfig, hooks: Hooks, buffer: StepBuffer, span: Span) -> None:
    """Fills the buffer.

    produces: one batch a step. consumes: prompts. waits for: a slot, the gate, generation, scoring.
    unblocked by: publication of a version that is new enough.
    """
    for step in span.steps:
        await buffer.grant(step)
        prompts = roles.prompts.next_batch(config.prompts_per_step)
        state: dict[str, Any] = {"cursor": roles.prompts.state()}
        rollouts = StepRollouts(
            roles,
            prompts,
            num_samples=config.num_samples,
            max_missing_fraction=config.max_missing_fraction,
            step=step,
            version=span.first_version + buffer.oldest_update(step),
            exact=config.max_staleness == 0,
            event=hooks.event,
        )
        await rollouts.draw()
        await rollouts.score()
        state["rewards"] = roles.rewards.state()
        await buffer.put(StepBatch(step, rollouts, state))


async def learn(roles: OnlineRoles, config: LoopConfig, hooks: Hooks, buffer: StepBuffer, span: Span) -> int:
    """Empties the buffer and trains; returns the number of updates done.

    produces: weight versions. consumes: batches. waits for: a batch, the gate, the learners.
    unblocked by: the collector.
    """
    for step in span.steps:
        batch = await buffer.take(step)
        rollouts = batch.rollouts
        for role, annotator in roles.annotators.items():
            await rollouts.annotate(role, annotator)
        await rollouts.record()
        learned: dict[str, float] = {}
        for role, learner in roles.learners.items():
            found = await rollouts.under(role, learner.update)
            learned |= {f"{role}/{name}": value for name, value in found.items()}
        async with roles.gate.hold("publish"):
            published = await roles.publisher.publish(span.first_version + step + 1)
        metrics = rollout_metrics(rollouts.groups, span.first_version + step) | learned
        metrics["rollout/drawn_again"] = float(len(rollouts.drawn_again))
        await hooks.log(step, metrics | {f"publish/{name}": value for name, value in published.items()})
        done = step + 1
        stop = hooks.should_stop()
        last = done == config.steps
        evaluated = config.evaluate_every > 0 and (last or done % config.evaluate_every == 0)
        if evaluated:
            await hooks.evaluate(done)
        if stop or last or evaluated or done % config.checkpoint_every == 0:
            await hooks.checkpoint(done, batch.state)
        if stop:
            return done
        await buffer.publish(done)
    return config.steps


async def train_online(
    roles: OnlineRoles, config: LoopConfig, hooks: Hooks, *, first_step: int = 0, first_version: int = 0
) -> int:
    """Runs steps ``first_step`` to ``config.steps`` and returns the number of updates done (fewer after a stop).

    The generator must already serve version ``first_version + first_step``. A failure of either half ends both and is
    raised as it is.
    """
    buffer = StepBuffer(first_step, config.max_staleness, config.step_timeout_s)
    span = Span(range(first_step, config.steps), first_version)
    collector = asyncio.create_task(collect(roles, config, hooks, buffer, span))
    learner = asyncio.create_task(learn(roles, config, hooks, buffer, span))
    try:
        await asyncio.wait({collector, learner}, return_when=asyncio.FIRST_COMPLETED)
        if not learner.done():
            collector.result()  # finished all its steps, or raises what ended it
        return await learner
    finally:
        for task in (collector, learner):
            task.cancel()
        await asyncio.gather(collector, learner, return_exceptions=True)


def rollout_metrics(groups: Sequence[GroupHandle], learner_version: int) -> dict[str, float]:
    """Scalars of one step's rollouts, from what the driver knows of them.

    ``staleness`` counts updates between the oldest weights that drew a group and the learner's.
    """
    scores = [s.value for g in groups for s in g.scores if s.value is not None]
    lengths = [length for g in groups for length in g.completion_lengths]
    num_scores = sum(len(g.scores) for g in groups)
    metrics = {
        "rollout/completion_length": sum(lengths) / len(lengths),
        "rollout/completion_tokens": float(sum(lengths)),
        "rollout/missing_scores": float(num_scores - len(scores)),
        "rollout/staleness": float(learner_version - min(g.weight_versions[0] for g in groups)),
    }
    if scores:
        mean = sum(scores) / len(scores)
        metrics["rollout/score"] = mean
        metrics["rollout/score_std"] = (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5
    names = sorted({name for g in groups for s in g.scores for name in s.components})
    for name in names:
        parts = [s.components[name] for g in groups for s in g.scores if name in s.components]
        metrics[f"rollout/score/{name}"] = sum(parts) / len(parts)
    return metrics
