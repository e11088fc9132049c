"""A write that goes on in a thread of its rank while the rank trains; at most one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning

from rlhf.errors import CheckpointError
from rlhf.runs.places import FileEntry, SaveStatus


class BackgroundWrite:
    """Runs one write, and keeps what came of it until it is asked for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Mapping[str, FileEntry]] | None = None

    def begin(self, write: Callable[[], Mapping[str, FileEntry]]) -> None:
        """Starts a write, once the one before it has ended; whoever began that one has had to ask for its result."""
        self.wait()
        self._running = self._pool.submit(write)

    def status(self, wait_s: float = 0.0) -> SaveStatus:
        """What has come of the write; a failure of the disk is in ``fault``, any other is raised.

        Args:
            wait_s: Longest wait for its end.
        """
        if self._running is None:
            return SaveStatus(fault="no write that was begun")
        try:
            return SaveStatus(files=self._running.result(timeout=wait_s))
        except StillRunning:
            return SaveStatus()
        except CheckpointError as error:
            return SaveStatus(fault=error.found)

    def wait(self) -> None:
        """Returns once no write goes on, whatever came of it; a write ends with its disk."""
        if self._running is not None:
            self._running.exception()

    def close(self) -> None:
        """Waits for the write and ends the thread."""
        self._pool.shutdown(wait=True)
