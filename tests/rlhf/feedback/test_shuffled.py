"""The null arm keeps every value and loses whose it was."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rlhf.feedback.shuffled import ShuffledJudge
from rlhf.types import GroupHandle, Score, Verdict

NUM_SAMPLES = 4


class ByIndex:
    """Says of sibling k that it is worth k, but could not judge the last one."""

    name = "judge"

    async def judge(self, groups: Sequence[GroupHandle]) -> list[tuple[Verdict, ...]]:
        last = NUM_SAMPLES - 1
        return [
            tuple(
                Verdict(group.uid, (k,), None if k == last else float(k), reason=f"said {k}", error="x" * (k == last))
                for k in range(NUM_SAMPLES)
            )
            for group in groups
        ]

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        return [tuple(Score(float(k)) for k in range(NUM_SAMPLES)) for _ in groups]


def handles(count: int) -> list[GroupHandle]:
    return [GroupHandle(f"p{i}", None, 3, (5,) * NUM_SAMPLES, (0, 0)) for i in range(count)]


def test_values_stay_with_the_prompt_and_leave_their_sibling() -> None:
    groups = handles(200)
    rows = asyncio.run(ShuffledJudge(ByIndex(), seed=1).score(groups))
    assert all(sorted(score.value for score in row) == [0.0, 1.0, 2.0, 3.0] for row in rows)
    means = [sum(row[k].value for row in rows) / len(rows) for k in range(NUM_SAMPLES)]
    assert all(abs(mean - 1.5) < 0.4 for mean in means), "a sibling's value no longer depends on which it is"


def test_a_verdict_that_is_missing_stays_missing_somewhere() -> None:
    (row,) = asyncio.run(ShuffledJudge(ByIndex(), seed=1).judge(handles(1)))
    assert [verdict.samples for verdict in row] == [(0,), (1,), (2,), (3,)]
    assert sorted(verdict.value for verdict in row if verdict.value is not None) == [0.0, 1.0, 2.0]
    assert [bool(verdict.error) for verdict in row] == [verdict.value is None for verdict in row]
    assert [verdict.reason for verdict in row] == [f"shuffled; was: said {k}" for k in range(NUM_SAMPLES)]


def test_the_order_is_drawn_by_seed_and_prompt() -> None:
    def values(seed: int) -> list[float | None]:
        rows = asyncio.run(ShuffledJudge(ByIndex(), seed).score(handles(20)))
        return [score.value for row in rows for score in row]

    assert values(1) == values(1)
    assert values(1) != values(2)
