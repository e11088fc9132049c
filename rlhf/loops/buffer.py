"""The step buffer: what bounds how far generation may run ahead of learning."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.errors import DeadlineError

if TYPE_CHECKING:
    from rlhf.loops.rollouts import StepRollouts


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rollouts of one training step and the collector's state (prompts, rewards) as they left it.

    The state travels with its batch: a checkpoint taken after this step resumes behind these prompts and scores,
    whatever the collector had drawn ahead by then, so that no prompt is lost, none is trained and no score counted
    twice.
    """

    step: int
    rollouts: StepRollouts
    state: Mapping[str, Any]


class StepBuffer:
    """Hands whole steps from the collector to the learner, with bounded staleness.

    A slot is one step's batch, so the unit that is admitted to the engines is the unit that is trained. With
    ``max_staleness = 0`` step ``s`` is generated only after update ``s - 1`` was published (synchronous); with 1 it may
    be generated one update earlier.

    produces: slots to the collector, batches to the learner. consumes: batches, published versions.
    waits for: ``grant`` for a publication, ``take`` for a batch. unblocked by: ``publish`` and ``put``.

    Args:
        first_step: The step that the learner takes first.
        max_staleness: How many updates older than the learner's weights a batch may be.
        timeout_s: Longest wait for a slot or a batch.
    """

    def __init__(self, first_step: int, max_staleness: int, timeout_s: float) -> None:
        self._max_staleness = max_staleness
        self._timeout_s = timeout_s
        self._num_published = first_step
        self._batches: dict[int, StepBatch] = {}
        self._changed = asyncio.Condition()

    def oldest_update(self, step: int) -> int:
        """The number of updates that the weights drawing ``step`` must have seen."""
        return max(0, step - self._max_staleness)

    async def grant(self, step: int) -> None:
        """Waits until ``step`` may be generated."""
        await self._wait(lambda: self._num_published >= self.oldest_update(step), f"slot for step {step}")

    async def put(self, batch: StepBatch) -> None:
        """Hands over a batch."""
        async with self._changed:
            self._batches[batch.step] = batch
            self._changed.notify_all()

    async def take(self, step: int) -> StepBatch:
        """Waits for the batch of ``step`` and gives it away."""
        await self._wait(lambda: step in self._batches, f"batch of step {step}")
        return self._batches.pop(step)

    async def publish(self, num_updates: int) -> None:
        """Says that the weights after ``num_updates`` updates serve everywhere."""
        async with self._changed:
            self._num_published = num_updates
            self._changed.notify_all()

    async def _wait(self, ready: Any, what: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s), self._changed:
                await self._changed.wait_for(ready)
        except TimeoutError:
            raise DeadlineError(
                f"step buffer, {what}",
                found=f"nothing after {self._timeout_s:.0f} s",
                needed="progress of the other side",
                action="See events.jsonl for a failed role, or raise loop.step_timeout_s.",
            ) from None
