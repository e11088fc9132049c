"""The ranks of an offline stage save and resume together: what one finds wrong, all find wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.background_write import BackgroundWrite
from actors.rank_saves import RankSaves
from rlhf.errors import CheckpointError, DeadlineError
from rlhf.runs import checkpoint
from rlhf.runs.places import FileEntry, SaveStatus, fetch_file, not_saved, write_file
from rlhf.runs.storage import LocalFolder

TIMEOUT_S = 60.0


class Meeting:
    """Where the ranks of one gang exchange values, in threads instead of processes."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=TIMEOUT_S)
        self.values: list[Any] = [None] * num_ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class Rank:
    """One rank, whose state is a number; its disk may be full, and its write be held back."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting = rank, meeting
        self.state = 0
        self.is_full = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.background = BackgroundWrite()

    def broadcast(self, value: Any) -> Any:
        return self.meeting.exchange(self.rank, value)[0]

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def save(self, place: str, state: int | None = None) -> dict[str, FileEntry]:
        self.go_on.wait(TIMEOUT_S)
        if self.is_full:
            raise not_saved(place, OSError(28, "No space left on device"))
        data = str(self.state if state is None else state).encode()
        return {f"rank_{self.rank}": write_file(place, f"rank_{self.rank}", [data])}

    def begin_save(self, place: str) -> None:
        state = self.state
        self.background.begin(lambda: self.save(place, state))

    def saved(self, wait_s: float = 0.0) -> SaveStatus:
        return self.background.status(wait_s)

    def verify(self, place: str, files: dict[str, FileEntry]) -> str:
        try:
            fetch_file(place, f"rank_{self.rank}", files[f"rank_{self.rank}"], None)
        except CheckpointError as error:
            return error.found
        return ""

    def load(self, place: str) -> None:
        self.state = int((Path(place) / f"rank_{self.rank}").read_text())


class Gang:
    """Two ranks with their part in the saves, each in a thread."""

    def __init__(self, folder: Path, *, in_background: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        meeting = Meeting(2)
        self.ranks = [Rank(rank, meeting) for rank in range(2)]
        self.events: list[tuple[str, Any]] = []
        learners: list[Any] = list(self.ranks)
        self.saves = [
            RankSaves(
                LocalFolder(folder), learners[rank], rank, keep=2, in_background=in_background, timeout_s=timeout_s
            )
            for rank in range(2)
        ]

    def all(self, work: Callable[[RankSaves], Any]) -> list[Any]:
        """Does something on both ranks at once; a failure of either comes back in its place."""

        def guarded(saves: RankSaves) -> Any:
            try:
                return work(saves)
            except (CheckpointError, DeadlineError) as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(guarded, self.saves))

    def resume(self) -> list[Any]:
        return self.all(lambda saves: saves.resume(lambda kind, fields: self.events.append((kind, fields["found"]))))

    def save(self, step: int) -> list[Any]:
        for rank in self.ranks:
            rank.state = 10 * step + rank.rank
        return self.all(lambda saves: saves.save(step))


@pytest.mark.parametrize("in_background", [False, True])
def test_every_rank_resumes_from_the_same_step(tmp_path: Path, in_background: bool) -> None:
    gang = Gang(tmp_path, in_background=in_background)
    assert gang.resume() == [None, None]
    for step in (1, 2, 3):
        assert gang.save(step) == [None, None]
    gang.all(lambda saves: saves.finish())
    assert checkpoint.steps(tmp_path) == [3, 2]
    other = Gang(tmp_path)
    assert other.resume() == [3, 3]
    assert [rank.state for rank in other.ranks] == [30, 31]


@pytest.mark.parametrize("damaged", [0, 1])
def test_what_one_rank_cannot_read_sends_all_to_the_one_before(tmp_path: Path, damaged: int) -> None:
    gang = Gang(tmp_path)
    gang.save(1)
    gang.save(2)
    (tmp_path / "step_2" / f"rank_{damaged}").write_text("99")
    other = Gang(tmp_path)
    assert other.resume() == [1, 1]
    assert [rank.state for rank in other.ranks] == [10, 11]
    assert other.events == [
        ("checkpoint_rejected", f"rank_{damaged} with altered bytes"),
        ("checkpoint_pointer_mended", "step_2"),
    ]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_of_all(tmp_path: Path, in_background: bool, full: int) -> None:
    gang = Gang(tmp_path, in_background=in_background)
    gang.save(1)
    gang.all(lambda saves: saves.finish())
    gang.ranks[full].is_full = True
    found = gang.save(2)
    if in_background:
        assert found == [None, None], "nobody knows yet"
        found = gang.all(lambda saves: saves.finish())
    assert all(isinstance(error, CheckpointError) and "No space left" in error.found for error in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_1"]
    gang.ranks[full].is_full = False
    assert gang.save(3) == [None, None]


def test_a_failed_write_is_told_between_two_steps(tmp_path: Path) -> None:
    gang = Gang(tmp_path, in_background=True)
    gang.ranks[1].is_full = True
    gang.save(1)
    for rank in gang.ranks:
        rank.background.wait()
    found = gang.all(lambda saves: saves.check())
    assert all(isinstance(error, CheckpointError) for error in found)
    assert gang.all(lambda saves: saves.check()) == [None, None], "told once"


def test_training_goes_on_while_a_rank_writes(tmp_path: Path) -> None:
    gang = Gang(tmp_path, in_background=True)
    gang.ranks[1].go_on.clear()
    assert gang.save(1) == [None, None]
    gang.ranks[0].state = gang.ranks[1].state = 99  # the next step
    gang.ranks[0].background.wait()
    assert gang.all(lambda saves: saves.check()) == [None, None]
    assert checkpoint.steps(tmp_path) == [], "one rank still writes"
    gang.ranks[1].go_on.set()
    gang.all(lambda saves: saves.finish())
    other = Gang(tmp_path)
    assert other.resume() == [1, 1]
    assert [rank.state for rank in other.ranks] == [10, 11], "the state as it was when the save began"


def test_a_write_that_does_not_end_has_its_time(tmp_path: Path) -> None:
    gang = Gang(tmp_path, in_background=True, timeout_s=0.0)
    gang.ranks[1].go_on.clear()
    gang.save(1)
    found = gang.all(lambda saves: saves.finish())
    gang.ranks[1].go_on.set()
    assert all(isinstance(error, DeadlineError) for error in found)


def test_what_is_no_failure_of_a_disk_is_raised_as_it_is() -> None:
    background = BackgroundWrite()

    def defect() -> dict[str, FileEntry]:
        raise ZeroDivisionError

    assert background.status().fault == "no write that was begun"
    background.begin(defect)
    background.wait()
    with pytest.raises(ZeroDivisionError):
        background.status()
    background.close()
