"""A stage's saves in the background: cancelled, failed or left, the checkpoints before them stay."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import CheckpointError, DeadlineError, LearnerError
from rlhf.runs import checkpoint
from rlhf.runs.places import FileEntry, SaveStatus, write_file
from rlhf.runs.saves import StageSaves
from rlhf.runs.storage import LocalFolder
from tests.fakes import FakeGate


class Writer:
    """A learner that writes when it is told to."""

    def __init__(self) -> None:
        self.place = ""
        self.ready = asyncio.Event()
        self.error: Exception | None = None
        self.asked = asyncio.Event()

    async def save(self, place: str) -> Mapping[str, FileEntry]:
        if self.error is not None:
            raise self.error
        return {"state": write_file(place, "state", [b"now"])}

    async def begin_save(self, place: str) -> None:
        self.place = place

    async def saved(self, wait_s: float = 0.0) -> SaveStatus:
        self.asked.set()
        if self.error is not None:
            raise self.error
        if not self.ready.is_set():
            return SaveStatus()
        return SaveStatus({"state": write_file(self.place, "state", [b"later"])})


def saves_of(folder: Path, learners: Mapping[str, Any], saved: list[int], **changes: Any) -> StageSaves:
    settings: dict[str, Any] = {"keep": 2, "in_background": True, "timeout_s": 60.0, "poll_s": 0.001} | changes
    return StageSaves(
        LocalFolder(folder), learners, FakeGate(), on_saved=lambda found: saved.append(found.step), **settings
    )


def run(body: Any) -> None:
    asyncio.run(asyncio.wait_for(body, 60))


def test_all_learners_make_one_checkpoint_when_the_last_is_ready(tmp_path: Path) -> None:
    async def body() -> None:
        learners = {"critic": Writer(), "learner": Writer()}
        saved: list[int] = []
        state = {"cursor": [1]}
        async with saves_of(tmp_path, learners, saved) as saves:
            await saves.save(1, state)
            state["cursor"].append(2)  # the loop goes on with it
            learners["critic"].ready.set()
            await learners["learner"].asked.wait()
            saves.check()
            assert saved == [] and checkpoint.steps(tmp_path) == []
            learners["learner"].ready.set()
        assert saved == [1], "the block waits for it"
        found = checkpoint.open_step(tmp_path, 1)
        assert found.state == {"cursor": [1]}
        assert set(found.files) == {"critic/state", "learner/state", "state.json"}
        assert checkpoint.first_fault(found) == ""

    run(body())


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    async def body() -> None:
        writer = Writer()
        saved: list[int] = []
        async with saves_of(tmp_path, {"learner": writer}, saved) as saves:
            await saves.save(1, {})
            second = asyncio.create_task(saves.save(2, {}))
            await writer.asked.wait()
            await asyncio.sleep(0.01)
            assert not second.done() and "step_1-" in writer.place
            writer.ready.set()
            await second
            assert saved == [1] and "step_2-" in writer.place
        assert saved == [1, 2]

    run(body())


@pytest.mark.parametrize("in_background", [False, True])
def test_a_learner_that_is_lost_while_it_writes_leaves_no_litter(tmp_path: Path, in_background: bool) -> None:
    async def body() -> None:
        writer = Writer()
        writer.error = LearnerError("learner[0]", found="a dead actor", needed="every rank", action="It restarts.")
        with pytest.raises(LearnerError, match="a dead actor"):
            async with saves_of(tmp_path, {"learner": writer}, [], in_background=in_background) as saves:
                await saves.save(1, {})

    run(body())
    assert list(tmp_path.iterdir()) == []


def test_the_error_that_ends_a_stage_is_told_and_what_it_saved_is_kept(tmp_path: Path) -> None:
    async def body() -> None:
        writer = Writer()
        writer.ready.set()
        saved: list[int] = []
        with pytest.raises(ValueError, match="the judge"):
            async with saves_of(tmp_path, {"learner": writer}, saved) as saves:
                await saves.save(1, {})
                raise ValueError("the judge")
        assert saved == [1]

    run(body())


def test_a_cancelled_stage_gives_up_what_is_being_written(tmp_path: Path) -> None:
    async def body() -> None:
        writer = Writer()

        async def stage() -> None:
            async with saves_of(tmp_path, {"learner": writer}, []) as saves:
                await saves.save(1, {})
                await asyncio.sleep(60)

        task = asyncio.create_task(stage())
        await writer.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body())
    assert list(tmp_path.iterdir()) == []


def test_a_write_without_end_has_its_time_and_is_raised_between_two_steps(tmp_path: Path) -> None:
    async def body() -> None:
        writer = Writer()
        saves = saves_of(tmp_path, {"learner": writer}, [], timeout_s=0.0)
        await saves.save(1, {})
        with pytest.raises(DeadlineError, match="a write of learner"):
            while True:
                saves.check()
                await asyncio.sleep(0.001)
        saves.check()  # told once
        await saves.finish()

    run(body())
    assert list(tmp_path.iterdir()) == []


def test_a_mark_that_fails_is_not_lost(tmp_path: Path) -> None:
    async def body() -> None:
        writer = Writer()
        writer.ready.set()

        def on_saved(found: checkpoint.Checkpoint) -> None:
            raise CheckpointError("BEST", found="a full disk", needed="room", action="Free some.")

        learners: dict[str, Any] = {"learner": writer}
        saves = StageSaves(
            LocalFolder(tmp_path),
            learners,
            FakeGate(),
            keep=1,
            in_background=True,
            on_saved=on_saved,
            timeout_s=60.0,
        )
        await saves.save(1, {})
        with pytest.raises(CheckpointError, match="a full disk"):
            await saves.finish()

    run(body())
    assert checkpoint.steps(tmp_path) == [1]
