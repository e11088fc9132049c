"""How far the feedback agrees with the independent scorer: reported, never learned from."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.context import RunContext


async def judge_agreement(context: RunContext, feedback: str, uids: Collection[str] | None = None) -> dict[str, float]:
    """Share of the feedback's ranked pairs that the independent scorer orders alike, as an ``Interval``.

    Args:
        context: The run, after its feedback stage.
        feedback: That stage's name.
        uids: Prompts whose rankings count; None takes all.
    """
    from cluster.fleets import evaluator
    from rlhf.loops.rollouts import repeated

    async def measure() -> dict[str, float]:
        recorder = await context.recorder()
        rankings = await recorder.call("put_rankings", feedback, uids)
        groups = await recorder.call("feedback_groups", feedback)
        worker = await evaluator(context, context.config.report_card)
        [agreement] = await worker.broadcast("judge_agreement", groups, rankings)
        return agreement

    return await repeated(measure, lambda error: context.event("feedback_read_again", stage=feedback, error=str(error)))
