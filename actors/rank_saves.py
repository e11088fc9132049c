"""How the ranks of an offline stage save and resume together: each its own files, rank 0 the checkpoint.

Every method is collective. Whatever one rank finds wrong is found by all, so that no rank waits for another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf.errors import CheckpointError, DeadlineError
from rlhf.runs import checkpoint
from rlhf.runs.checkpoint import Checkpoint, OnEvent
from rlhf.runs.places import FileEntry, SaveStatus
from rlhf.runs.storage import Storage

if TYPE_CHECKING:
    from actors.learner import LearnerWorker


class RankSaves:
    """One rank's part in the checkpoints of its stage.

    Args:
        storage: Holds them.
        learner: This rank's.
        rank: This rank.
        keep: Newest checkpoints that stay.
        in_background: Whether copies of the state are written while training goes on.
        timeout_s: Longest wait for one write.
    """

    def __init__(
        self, storage: Storage, learner: LearnerWorker, rank: int, *, keep: int, in_background: bool, timeout_s: float
    ) -> None:
        self._storage, self._learner, self._rank = storage, learner, rank
        self._keep, self._in_background, self._timeout_s = keep, in_background, timeout_s
        self._writing: tuple[str, int] | None = None
        """Place and step of the write that goes on; the same on every rank."""

    def resume(self, on_event: OnEvent) -> int | None:
        """Loads the newest checkpoint that every rank finds good, and returns its step; None where there is none.

        Raises:
            CheckpointError: There are checkpoints, and none is good.
        """
        if self._rank == 0:
            found = checkpoint.load_latest(self._storage, self._verify_with_all, on_event=on_event)
            self._learner.broadcast(("load", found))
        else:
            task, found = self._learner.broadcast(None)
            while task == "verify":
                self._first_fault(self._learner.verify(found.place, found.files))
                task, found = self._learner.broadcast(None)
        if found is None:
            return None
        self._learner.load(found.place)
        return int(found.step)

    def _verify_with_all(self, candidate: Checkpoint) -> str:
        self._learner.broadcast(("verify", candidate))
        return self._first_fault(self._learner.verify(candidate.place, candidate.files))

    def _first_fault(self, own: str) -> str:
        return next((fault for fault in self._learner.gather(own) if fault), "")

    def save(self, step: int) -> None:
        """Takes the checkpoint of a step; in the background it returns once the copies are taken.

        Raises:
            CheckpointError: This one, or the one before it, could not be written.
        """
        self.finish()
        place = self._on_rank_0(lambda: checkpoint.begin(self._storage, step, keep=self._keep))
        self._writing = (place, step)
        if self._in_background:
            self._learner.begin_save(place)
        else:
            self._complete(self._written_now(place))

    def _written_now(self, place: str) -> SaveStatus:
        try:
            return SaveStatus(files=self._learner.save(place))
        except CheckpointError as error:
            return SaveStatus(fault=error.found)

    def check(self) -> None:
        """Makes a checkpoint of what has been written in the background, once all ranks are done; between two steps.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._writing is not None:
            self._complete(self._learner.saved())

    def finish(self) -> None:
        """Waits for the write that goes on.

        Raises:
            CheckpointError: It could not be written.
            DeadlineError: It took longer than it may.
        """
        deadline = time.monotonic() + self._timeout_s
        while self._writing is not None:
            self._complete(self._learner.saved(1.0))
            if self._writing is not None and time.monotonic() >= deadline:
                raise DeadlineError(
                    self._writing[0],
                    found=f"a write that took over {self._timeout_s:.0f} s",
                    needed="its end",
                    action="Look at the storage; raise deepspeed.collective_timeout_s if a checkpoint is this large.",
                )

    def _complete(self, own: SaveStatus) -> None:
        """Commits once every rank has written, and raises on every rank what went wrong on one."""
        assert self._writing is not None
        (place, step), states = self._writing, self._learner.gather(own)
        if fault := next((state.fault for state in states if state.fault), ""):
            self._writing = None
            if self._rank == 0:
                self._storage.discard(place)
            raise CheckpointError(
                place,
                found=fault,
                needed="a writable disk with room for one more checkpoint",
                action="Free space or mend the permissions, then run the same command again; earlier checkpoints are "
                "intact.",
            )
        if any(state.files is None for state in states):
            return
        self._writing = None
        files = {name: entry for state in states for name, entry in state.files.items()}
        self._on_rank_0(lambda: self._commit(place, step, files))

    def _commit(self, place: str, step: int, files: Mapping[str, FileEntry]) -> None:
        try:
            checkpoint.commit(self._storage, place, step, files, state={}, keep=self._keep)
        except CheckpointError:
            self._storage.discard(place)
            raise

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Does something on rank 0; its value, or its ``CheckpointError``, is every rank's."""
        result: tuple[Any, CheckpointError | None] | None = None
        if self._rank == 0:
            try:
                result = (work(), None)
            except CheckpointError as error:
                result = (None, error)
        value, failure = self._learner.broadcast(result)
        if failure is not None:
            raise failure
        return value
