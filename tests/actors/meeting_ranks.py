"""Ranks for the gang tests: a module of its own, so that their processes need not import PyTorch."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

from rlhf.errors import CheckpointError, DataError, RolloutsLostError
from rlhf.runs.places import FileEntry, SaveStatus, fetch_file, write_file


class RankWorker:
    """A rank that waits for its peers' files where a real one waits in a collective."""

    def __init__(self, rank: int, num_ranks: int, folder: Path, fault: str = "") -> None:
        self.rank, self.num_ranks, self.folder, self.fault = rank, num_ranks, folder, fault
        self.num_calls = 0

    def _collective(self, seconds: float = 60.0) -> None:
        self.num_calls += 1
        (self.folder / f"{self.num_calls}-{self.rank}").touch()
        deadline = time.monotonic() + seconds
        while len(list(self.folder.glob(f"{self.num_calls}-*"))) < self.num_ranks:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def pid(self) -> int:
        return os.getpid()

    def start(self) -> None:
        self._collective()

    def update(self, groups):
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            time.sleep(1000)
        if self.fault == "defect":
            raise ValueError("a defect")
        if self.fault == "lost once":
            self.fault = ""
            raise RolloutsLostError.of("learner", ["p3"], "a node went away")
        if self.fault == "data":
            raise DataError("batch", found="x", needed="y", action="z")
        self._collective()
        return {"uids": [group.uid for group in groups], "rank": self.rank}

    def annotate(self, groups):
        self._collective()
        return [dataclasses.replace(group, annotations={"values": self.rank}) for group in groups]

    def save(self, place: str) -> dict[str, FileEntry]:
        self._collective()
        return {f"rank{self.rank}": write_file(place, f"rank{self.rank}", [b"state"])}

    def begin_save(self, place: str) -> None:
        self.place, self.looks = place, 0

    def saved(self, wait_s: float = 0.0) -> SaveStatus:
        """Rank 0 is ready first; the last rank says so at its third look, or fails."""
        self.looks += 1
        if self.fault == "disk" and self.rank == self.num_ranks - 1:
            return SaveStatus(fault="No space left on device")
        if self.looks <= 2 * self.rank:
            return SaveStatus()
        return SaveStatus({f"rank{self.rank}": write_file(self.place, f"rank{self.rank}", [b"state"])})

    def verify(self, place: str, files: dict[str, FileEntry]) -> str:
        try:
            fetch_file(place, f"rank{self.rank}", files[f"rank{self.rank}"], None)
        except CheckpointError as error:
            return error.found
        return ""

    def stop(self) -> None:
        if self.fault == "stop":
            raise DataError("stop", found="x", needed="y", action="z")
