"""The null arm: a judge whose verdicts are dealt out at random."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from rlhf.protocols import Judge, RewardSource
from rlhf.types import GroupHandle, Score, Verdict

_Item = TypeVar("_Item")


class JudgingSource(Judge, RewardSource, Protocol):
    """A judge whose verdicts are also rewards."""


class ShuffledJudge:
    """Deals what a pointwise judge says of a prompt's siblings out among them: learning from it must improve nothing.

    The values keep their distribution over prompts and within each; only which sibling has which is lost.

    Args:
        judge: Gives the verdicts and scores.
        seed: Draws the order, together with the prompt.
    """

    name = "judge"

    def __init__(self, judge: JudgingSource, seed: int) -> None:
        self._judge = judge
        self._seed = seed

    async def judge(self, groups: Sequence[GroupHandle]) -> list[tuple[Verdict, ...]]:
        """See ``Judge.judge``; the reason of each verdict says what it was."""
        shuffled = []
        for verdicts in await self._judge.judge(groups):
            dealt = self._deal(verdicts[0].uid, verdicts)
            shuffled.append(
                tuple(
                    dataclasses.replace(
                        verdict, value=other.value, error=other.error, reason=f"shuffled; was: {verdict.reason}"
                    )
                    for verdict, other in zip(verdicts, dealt, strict=True)
                )
            )
        return shuffled

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """See ``RewardSource.score``."""
        scores = await self._judge.score(groups)
        return [tuple(self._deal(group.uid, siblings)) for group, siblings in zip(groups, scores, strict=True)]

    def _deal(self, uid: str, items: Sequence[_Item]) -> list[_Item]:
        dealt = list(items)
        random.Random(f"{self._seed}/{uid}").shuffle(dealt)
        return dealt
