"""The label loop: every prompt judged once, chunk by chunk, resumable; missing verdicts bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rlhf.errors import MissingFeedbackError, RolloutsLostError
from rlhf.loops.label import LabelConfig, LabelRoles, label
from rlhf.types import Score
from tests.fakes import FakeRun, make_prompts


class ChunkRecorder:
    def __init__(self, fail_at: int | None = None, lost: Sequence[RolloutsLostError] = ()) -> None:
        self.chunks: dict[int, tuple[list, list]] = {}
        self.fail_at = fail_at
        self.lost = list(lost)

    async def record_chunk(self, chunk, groups, judgements) -> None:
        if self.lost:
            raise self.lost.pop(0)
        if chunk == self.fail_at:
            raise OSError("disk full")
        self.chunks[chunk] = (list(groups), list(judgements))

    async def has_chunk(self, chunk: int) -> bool:
        return chunk in self.chunks


def run_label(run: FakeRun, recorder: ChunkRecorder, num_prompts: int, **changes) -> list[int]:
    told: list[int] = []
    config = LabelConfig(**({"num_samples": 2, "prompts_per_chunk": 3} | changes))
    roles = LabelRoles(run, run, recorder, run.gate, run.event)
    asyncio.run(label(roles, config, make_prompts(num_prompts), version=5, progress=told.append))
    return told


def test_every_prompt_is_judged_once_in_chunks() -> None:
    run, recorder = FakeRun(version=5), ChunkRecorder()
    assert run_label(run, recorder, 7) == [3, 3, 1]
    for recorded in zip(*recorder.chunks.values(), strict=True):  # groups, judgements
        assert [one.uid for chunk in recorded for one in chunk] == [f"p{i}" for i in range(7)]
    assert run.versions == [5, 5, 5]
    assert run.gate.holders == ["generation", "judge"] * 3


def test_a_second_call_does_only_what_is_not_on_disk() -> None:
    run, recorder = FakeRun(version=5), ChunkRecorder(fail_at=1)
    with pytest.raises(OSError, match="disk full"):
        run_label(run, recorder, 7)
    recorder.fail_at = None
    again = FakeRun(version=5)
    assert run_label(again, recorder, 7) == [3, 3, 1]
    assert [what for kind, what in again.log if kind == "judge"] == ["p3", "p6"]
    assert sorted(recorder.chunks) == [0, 1, 2]


def test_missing_verdicts_pass_below_the_fraction_and_stop_above_it() -> None:
    run = FakeRun(version=5)
    run.score_of = lambda uid, sibling: Score(None) if (uid, sibling) == ("p4", 0) else Score(float(sibling))
    recorder = ChunkRecorder()
    run_label(run, recorder, 6, max_missing_fraction=0.17)
    errors = [judgement.errors for _, judgements in recorder.chunks.values() for judgement in judgements]
    assert [found for found in errors if found] == [("",)] and recorder.chunks[1][1][1].errors == ("",)

    run.log.clear()
    recorder = ChunkRecorder()
    with pytest.raises(MissingFeedbackError, match="feedback chunk 1"):
        run_label(run, recorder, 6, max_missing_fraction=0.16)
    assert sorted(recorder.chunks) == [0], "a chunk that fails is not written"


def test_groups_that_are_lost_before_they_are_written_are_drawn_and_judged_again() -> None:
    run = FakeRun(version=5, fail={("judge", 0): RolloutsLostError.of("judge", ["p1"], "a node went away")})
    recorder = ChunkRecorder(lost=[RolloutsLostError.of("recorder", ["p0", "p2"], "a node went away")])
    assert run_label(run, recorder, 4) == [3, 1]
    assert run.drawn == [("p0", "p1", "p2"), ("p1",), ("p0", "p2"), ("p3",)]
    assert [g.payload for g in recorder.chunks[0][0]] == ["p0, draw 3", "p1, draw 2", "p2, draw 3"]
    assert [(kind, fields["where"], fields["uids"]) for kind, fields in run.events] == [
        ("rollouts_drawn_again", "feedback chunk 0", ["p1"]),
        ("rollouts_drawn_again", "feedback chunk 0", ["p0", "p2"]),
    ]
