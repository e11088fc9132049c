"""How an online stage takes its checkpoints: at once, or as a copy that is written while training goes on."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rlhf.errors import CheckpointError, DeadlineError, RlhfError
from rlhf.protocols import Learner, PhaseGate
from rlhf.runs import checkpoint
from rlhf.runs.checkpoint import Checkpoint
from rlhf.runs.places import FileEntry, SaveStatus, join
from rlhf.runs.storage import Storage


class StageSaves:
    """Saves all learners of a stage as one checkpoint. Leaving its block waits for the write that goes on.

    A write that failed is raised by the next call of ``check``, ``save`` or ``finish``, or at the block's end. A block
    that ends by a cancellation gives the write up; the checkpoint before it stays.

    Args:
        storage: Holds the stage's checkpoints.
        learners: By name; each writes below a place of that name.
        gate: Held for each learner while its state is copied or written.
        keep: Newest checkpoints that stay.
        in_background: Whether copies are written while training goes on.
        on_saved: Is told of each checkpoint once it exists.
        timeout_s: Longest wait for one write.
        poll_s: How often a write that nobody waits for is looked after.
    """

    def __init__(
        self,
        storage: Storage,
        learners: Mapping[str, Learner],
        gate: PhaseGate,
        *,
        keep: int,
        in_background: bool,
        on_saved: Callable[[Checkpoint], None],
        timeout_s: float,
        poll_s: float = 0.25,
    ) -> None:
        self._storage, self._learners, self._gate = storage, learners, gate
        self._keep, self._in_background, self._on_saved = keep, in_background, on_saved
        self._timeout_s, self._poll_s = timeout_s, poll_s
        self._writing: asyncio.Task[None] | None = None
        self._is_awaited = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self.finish()
        elif isinstance(error, Exception):
            with contextlib.suppress(RlhfError):  # the error that ended the block is told; what it had saved is kept
                await self.finish()
        else:
            await self._give_up()

    async def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Takes the checkpoint of a step; in the background it returns once the copies are taken.

        Raises:
            CheckpointError: This one, or the one before it, could not be written.
        """
        await self.finish()
        state = copy.deepcopy(dict(state))  # it is written later, when its owner has gone on
        place = await asyncio.to_thread(checkpoint.begin, self._storage, step, keep=self._keep)
        files: dict[str, FileEntry] = {}
        async with self._filling(place):
            for name, learner in self._learners.items():
                async with self._gate.hold(name):
                    if self._in_background:
                        await learner.begin_save(join(place, name))
                    else:
                        files |= _below(name, await learner.save(join(place, name)))
        if self._in_background:
            self._writing = asyncio.create_task(self._finish_writing(place, step, state))
        else:
            await self._commit(place, step, files, state)

    @contextlib.asynccontextmanager
    async def _filling(self, place: str) -> AsyncIterator[None]:
        """A block that fills a place; one that does not come to its end leaves nothing there."""
        is_filled = False
        try:
            yield
            is_filled = True
        finally:
            if not is_filled:
                await asyncio.shield(asyncio.to_thread(self._storage.discard, place))

    def check(self) -> None:
        """Raises what a write in the background has failed with; between two steps, and at no cost."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()

    async def finish(self) -> None:
        """Waits for the write that goes on.

        Raises:
            CheckpointError: It failed; the checkpoints before it are intact.
            LearnerError: A learner is gone.
        """
        if self._writing is None:
            return
        self._is_awaited = True
        try:
            await self._writing
        finally:
            self._is_awaited = False
            if self._writing.done():
                self._writing = None

    async def _give_up(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
            self._writing = None

    async def _finish_writing(self, place: str, step: int, state: Mapping[str, Any]) -> None:
        """Waits until every learner has written, then makes the checkpoint of it."""
        deadline = time.monotonic() + self._timeout_s
        files: dict[str, FileEntry] = {}
        async with self._filling(place):
            for name, learner in self._learners.items():
                files |= _below(name, await self._written(name, learner, place, deadline))
        await self._commit(place, step, files, state)

    async def _written(self, name: str, learner: Learner, place: str, deadline: float) -> Mapping[str, FileEntry]:
        while True:
            # A rank answers between its other work; it may wait only where nobody else needs it.
            status: SaveStatus = await learner.saved(1.0 if self._is_awaited else 0.0)
            if status.fault:
                raise CheckpointError(
                    place,
                    found=f"{name}: {status.fault}",
                    needed="a writable disk with room for one more checkpoint",
                    action="Free space or mend the permissions, then run the same command again; earlier checkpoints "
                    "are intact.",
                )
            if status.files is not None:
                return status.files
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    place,
                    found=f"a write of {name} that took over {self._timeout_s:.0f} s",
                    needed="its end",
                    action="Look at the storage; raise the learner's call_timeout_s if a checkpoint is this large.",
                )
            await asyncio.sleep(0.0 if self._is_awaited else self._poll_s)

    async def _commit(self, place: str, step: int, files: Mapping[str, FileEntry], state: Mapping[str, Any]) -> None:
        """A cancellation from here on does not tear the commit apart: it is waited for to its end."""

        def commit() -> Checkpoint:
            try:
                return checkpoint.commit(self._storage, place, step, files, state=state, keep=self._keep)
            except RlhfError:
                self._storage.discard(place)
                raise

        committing = asyncio.ensure_future(asyncio.to_thread(commit))
        try:
            saved = await asyncio.shield(committing)
        except asyncio.CancelledError:
            await asyncio.wait({committing})
            raise
        self._on_saved(saved)


def _below(name: str, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    return {f"{name}/{file}": entry for file, entry in files.items()}
