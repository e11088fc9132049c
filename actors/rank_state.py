"""What a learner's rank does with checkpoints: its own part of them. Loading alone is collective."""

from __future__ import annotations

from collections.abc import Mapping

from actors.deepspeed.engine import TrainEngine
from rlhf.runs.places import FileEntry, SaveStatus


class RankCheckpoints:
    """The part of ``LearnerWorker`` that saves and loads.

    A place is a folder or a URL, see ``rlhf.runs.places``. The caller makes a checkpoint of what all ranks wrote.
    """

    _engine: TrainEngine

    def save(self, place: str) -> dict[str, FileEntry]:
        """Writes this rank's files and says what they are."""
        return self._engine.save(place)

    def begin_save(self, place: str) -> None:
        """Like ``save``, of a copy in host memory that is written while training goes on; ``saved`` says how far."""
        self._engine.begin_save(place)

    def saved(self, wait_s: float = 0.0) -> SaveStatus:
        """What has come of ``begin_save``, after at most ``wait_s`` seconds."""
        return self._engine.saved(wait_s)

    def abandon(self) -> None:
        """Returns when nothing is written any more that a driver which is gone had asked for.

        Fails on a rank that was never started: such a one cannot be taken over.
        """
        self._engine.wait_for_writes()

    def verify(self, place: str, files: Mapping[str, FileEntry]) -> str:
        """Checks what this rank will read of a checkpoint; says what is wrong, or nothing."""
        return self._engine.verify(place, files)

    def load(self, place: str) -> None:
        """Restores what the ranks saved, on any number of ranks, after ``verify``; a collective."""
        self._engine.load(place)
