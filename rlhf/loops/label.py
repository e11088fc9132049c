"""The label loop: prompts -> K siblings -> verdicts -> rankings, in chunks that are each on disk before the next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.feedback.missing import check_missing
from rlhf.loops.rollouts import Event, Rollouts
from rlhf.protocols import Generator, Judge, PhaseGate
from rlhf.types import GroupHandle, Judgement, Prompt


class LabelConfig(StrictModel):
    """How feedback is collected."""

    num_samples: int = Field(default=4, ge=2)
    """Siblings per prompt (K)."""
    prompts_per_chunk: int = Field(default=64, ge=1)
    """Prompts that are generated, judged and written together; a restart repeats at most one chunk."""
    max_missing_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Above this fraction of missing verdicts, or of prompts that could not be answered, in a chunk the run stops."""


class LabelRecorder(Protocol):
    """Ranks a chunk's siblings by their verdicts and writes all of it; knows which chunks are complete."""

    async def record_chunk(self, chunk: int, groups: Sequence[GroupHandle], judgements: Sequence[Judgement]) -> None:
        """Returns when samples, verdicts and rankings are on disk."""
        ...

    async def has_chunk(self, chunk: int) -> bool:
        """Whether ``record_chunk`` has finished for this chunk in this or an earlier run."""
        ...


@dataclass(frozen=True, slots=True)
class LabelRoles:
    """The roles of the label loop."""

    generator: Generator
    judge: Judge
    recorder: LabelRecorder
    gate: PhaseGate
    event: Event


async def label(
    roles: LabelRoles,
    config: LabelConfig,
    prompts: Sequence[Prompt],
    *,
    version: int,
    progress: Callable[[int], None],
) -> None:
    """Labels every prompt.

    Chunks found complete are left alone, so the same call resumes. ``progress`` is told the prompts of each chunk.

    Raises:
        MissingFeedbackError: Too many verdicts of a chunk are missing; those before it are on disk.
    """
    size = config.prompts_per_chunk
    for chunk, start in enumerate(range(0, len(prompts), size)):
        some = prompts[start : start + size]
        if not await roles.recorder.has_chunk(chunk):
            rollouts = Rollouts(
                roles.generator,
                roles.gate,
                some,
                num_samples=config.num_samples,
                max_missing_fraction=config.max_missing_fraction,
                version=version,
                exact=True,
                where=f"feedback chunk {chunk}",
                event=roles.event,
            )
            await rollouts.draw()
            await rollouts.over(functools.partial(_judge_chunk, roles, config, chunk))
        progress(len(some))


async def _judge_chunk(roles: LabelRoles, config: LabelConfig, chunk: int, groups: Sequence[GroupHandle]) -> None:
    """Judges, ranks and writes one chunk. May be repeated."""
    async with roles.gate.hold("judge"):
        judgements = await roles.judge.judge(groups)
    errors = [error for judgement in judgements for error in judgement.errors]
    total = sum(judgement.num_verdicts for judgement in judgements)
    check_missing(errors, total, config.max_missing_fraction, f"verdicts of feedback chunk {chunk}")
    await roles.recorder.record_chunk(chunk, groups, judgements)
