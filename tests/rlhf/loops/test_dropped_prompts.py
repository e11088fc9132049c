"""Prompts that the generator gives up: left out of their step, told, and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from rlhf.errors import MissingFeedbackError, RolloutsLostError
from rlhf.loops.label import LabelConfig, LabelRoles, label
from rlhf.loops.online import train_online
from rlhf.types import GroupHandle, Prompt
from tests.fakes import FakeGate, FakeRun, loop_config, make_prompts


class ChokingRun(FakeRun):
    """Its generator gives the prompts in ``bad`` up."""

    bad: frozenset[str] = frozenset({"p5"})

    async def generate(self, prompts: Sequence[Prompt], **how: Any) -> list[GroupHandle]:
        return [group for group in await super().generate(prompts, **how) if group.uid not in self.bad]


def train(run: FakeRun, **changes: Any) -> int:
    async def body() -> int:
        async with asyncio.timeout(20):
            return await train_online(run.roles, loop_config(**changes), run.hooks)

    return asyncio.run(body())


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_step_goes_on_without_a_prompt_that_was_given_up(max_staleness: int) -> None:
    run = ChokingRun()
    assert train(run, steps=3, prompts_per_step=4, max_missing_fraction=0.25, max_staleness=max_staleness) == 3
    assert run.trained == [("p0", "p1", "p2", "p3"), ("p4", "p6", "p7"), ("p8", "p9", "p10", "p11")]
    assert run.recorded[1] == ("p4", "p6", "p7")
    assert run.events == [("prompts_dropped", {"where": "step 1", "uids": ["p5"]})]


def test_above_the_allowed_fraction_the_run_stops() -> None:
    run = ChokingRun()
    with pytest.raises(MissingFeedbackError, match=r"prompts of step 1: found 1 of 4 missing \(25%\)"):
        train(run, steps=3, prompts_per_step=4, max_missing_fraction=0.2)
    assert run.trained == [("p0", "p1", "p2", "p3")]


def test_a_lost_group_is_drawn_again_at_its_place_behind_one_that_was_dropped() -> None:
    fault = RolloutsLostError.of("fake[0]", ("p6",), "a node went away")
    run = ChokingRun(position=4, fail={("update", 0): fault})
    train(run, steps=1, prompts_per_step=4, max_missing_fraction=0.25)
    assert run.trained == [("p4", "p6", "p7")]
    assert sorted(run.drawn) == [("p4", "p5", "p6", "p7"), ("p6",)]


def test_a_lost_group_whose_prompt_is_given_up_at_its_second_draw_ends_the_step() -> None:
    fault = RolloutsLostError.of("fake[0]", ("p2",), "a node went away")
    run = ChokingRun(fail={("update", 0): fault})

    async def give_up() -> None:
        run.bad = frozenset({"p2"})

    original = run.update

    async def update(groups: Sequence[GroupHandle]) -> Any:
        await give_up()
        return await original(groups)

    run.update = update  # type: ignore[method-assign]
    with pytest.raises(RolloutsLostError) as caught:
        train(run, steps=1, prompts_per_step=4)
    assert caught.value is fault


class ChunkRecorder:
    """Keeps the uids of each chunk."""

    def __init__(self) -> None:
        self.chunks: dict[int, list[str]] = {}

    async def has_chunk(self, chunk: int) -> bool:
        return chunk in self.chunks

    async def record_chunk(self, chunk: int, groups: Sequence[GroupHandle], judgements: Sequence[Any]) -> None:
        self.chunks[chunk] = [group.uid for group in groups]


def test_a_chunk_of_feedback_goes_on_without_it_too() -> None:
    run, recorder, progress = ChokingRun(), ChunkRecorder(), []
    roles = LabelRoles(generator=run, judge=run, recorder=recorder, gate=FakeGate(), event=run.event)
    config = LabelConfig(num_samples=2, prompts_per_chunk=4, max_missing_fraction=0.25)
    asyncio.run(label(roles, config, make_prompts(8), version=0, progress=progress.append))
    assert recorder.chunks == {0: ["p0", "p1", "p2", "p3"], 1: ["p4", "p6", "p7"]}
    assert progress == [4, 4]
