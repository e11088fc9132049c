"""The null arm keeps every value and loses whose it was."""

from __future__ import annotations

from rlhf.feedback.shuffled import shuffle_verdicts
from rlhf.types import Verdict

NUM_SAMPLES = 4


def by_index(uid: str, missing: int | None = None) -> list[Verdict]:
    """Says of sibling k that it is worth k, but could not judge one."""
    return [
        Verdict(uid, (k,), None if k == missing else float(k), reason=f"said {k}", error="x" * (k == missing))
        for k in range(NUM_SAMPLES)
    ]


def test_values_stay_with_the_prompt_and_leave_their_sibling() -> None:
    rows = [shuffle_verdicts(by_index(f"p{i}"), seed=1) for i in range(200)]
    assert all(sorted(verdict.value for verdict in row) == [0.0, 1.0, 2.0, 3.0] for row in rows)
    means = [sum(row[k].value for row in rows) / len(rows) for k in range(NUM_SAMPLES)]
    assert all(abs(mean - 1.5) < 0.4 for mean in means), "a sibling's value no longer depends on which it is"


def test_a_verdict_that_is_missing_stays_missing_somewhere() -> None:
    row = shuffle_verdicts(by_index("p0", missing=3), seed=1)
    assert [verdict.samples for verdict in row] == [(0,), (1,), (2,), (3,)]
    assert sorted(verdict.value for verdict in row if verdict.value is not None) == [0.0, 1.0, 2.0]
    assert [bool(verdict.error) for verdict in row] == [verdict.value is None for verdict in row]
    assert [verdict.reason for verdict in row] == [f"shuffled; was: said {k}" for k in range(NUM_SAMPLES)]


def test_the_order_is_drawn_by_seed_and_prompt() -> None:
    def values(seed: int) -> list[float | None]:
        return [v.value for i in range(20) for v in shuffle_verdicts(by_index(f"p{i}"), seed)]

    assert values(1) == values(1)
    assert values(1) != values(2)


def test_nothing_to_shuffle() -> None:
    assert shuffle_verdicts((), seed=1) == ()
