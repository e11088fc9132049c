"""A gang: the ranks of one learner, which act together, fail together and restart together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.calls import await_ref, gather_all, kill
from actors.parts import LEARNER_PARTS
from actors.roles import Meter
from rlhf.errors import DeadlineError, LearnerError, ReplicaLostError, RlhfError, RolloutsLostError
from rlhf.maths.packing import deal
from rlhf.runs.places import FileEntry, SaveStatus
from rlhf.types import GroupHandle


class LearnerGang:
    """The ``Learner`` seam over rank actors.

    Calls are submitted to every rank before any is awaited, so that collectives meet in the same order on all. The
    first failure of any rank kills the gang: a rank that waits in a collective for a dead one would wait for ever.

    Args:
        role: Name in logs and errors.
        ranks: Actor handles of ``LearnerWorker``s, rank order.
        timeout_s: Longest wait for one call.
        meter: Is told the tokens of every update and annotation, and the seconds that they took.
        num_epochs: Times that an update trains on each token.
    """

    def __init__(
        self,
        role: str,
        ranks: Sequence[Any],
        *,
        timeout_s: float = 1800.0,
        meter: Meter = lambda role, tokens, s: None,
        num_epochs: int = 1,
    ) -> None:
        self.role = role
        self.ranks = list(ranks)
        self.lock = asyncio.Lock()
        """Held over an update and over a whole publication, so that no export mixes two versions. Waiting for it ends
        with its holder's calls, of which each has a timeout: ``timeout_s`` of the ranks, the publisher's of a bucket on
        a replica."""
        self._timeout_s = timeout_s
        self._meter = meter
        self._num_epochs = num_epochs
        self._resident = LEARNER_PARTS
        self.lost_to: RlhfError | None = None
        """What ended the gang, where something did."""
        self.detect_s = 0.0
        """Seconds from the last sign of life of the lost rank, or from the start of the failed call, to that end."""
        self._called_at = time.monotonic()
        self._seen: dict[Any, float] = {}

    async def call(self, method: str, args_of_rank: Callable[[int], tuple[Any, ...]] = lambda rank: ()) -> list[Any]:
        """Calls a method on every rank and returns the results in rank order.

        Raises:
            LearnerError: A rank died, hung or failed; the whole gang has been ended.
            NonFiniteError: Too many updates in a row were not finite.
            RolloutsLostError: Groups went away with their node; the gang lives and its weights are as they were.
        """
        self._require_ranks()
        self._called_at = time.monotonic()
        refs = [getattr(handle, method).remote(*args_of_rank(rank)) for rank, handle in enumerate(self.ranks)]
        try:
            return await gather_all(
                await_ref(ref, timeout_s=self._timeout_s, where=f"{self.role}[{rank}].{method}")
                for rank, ref in enumerate(refs)
            )
        except (ReplicaLostError, DeadlineError) as error:
            self.give_up(error)
            raise self._loss() from error
        except RolloutsLostError:  # all ranks raise it, none has changed
            raise
        except RlhfError:
            self.kill()
            raise

    def saw(self, rank: Any) -> None:
        """Notes a sign of life of one rank, given as its actor."""
        self._seen[rank] = time.monotonic()

    def give_up(self, error: RlhfError, rank: Any = None) -> None:
        """Ends the gang for what happened to one rank; a call that is under way fails with it."""
        if self.lost_to is None:
            seen = self._seen.get(rank, 0.0) if rank is not None else min(self._seen.values(), default=0.0)
            self.lost_to, self.detect_s = error, time.monotonic() - max(self._called_at, seen)
        self.kill()

    def lose(self, error: RlhfError) -> LearnerError:
        """Ends the gang for what happened to rank 0, and returns the error for its user."""
        self.give_up(error, next(iter(self.ranks), None))
        return self._loss()

    def _loss(self) -> LearnerError:
        assert self.lost_to is not None, "given up before"
        return LearnerError(
            self.lost_to.where,
            found=self.lost_to.found,
            needed="every rank",
            action="The gang restarts from the last verified checkpoint.",
        )

    def _require_ranks(self) -> None:
        if not self.ranks:
            why = f" ({self.lost_to.where}: {self.lost_to.found})" if self.lost_to is not None else ""
            raise LearnerError(
                self.role, found=f"a gang that was ended{why}", needed="living ranks", action="Run the command again."
            )

    def kill(self) -> None:
        """Ends every rank at once."""
        for handle in self.ranks:
            kill(handle)
        self.ranks = []

    async def reside(self, parts: Collection[str]) -> None:
        """Keeps these parts (``weights``, ``state``) of every rank in device memory, the others in host memory."""
        async with self.lock:
            await self._reside(frozenset(parts))

    async def _reside(self, parts: frozenset[str]) -> None:
        await self.call("reside", lambda rank: (sorted(parts),))
        self._resident = parts

    @contextlib.asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Keeps the weights still, and in device memory, for the length of a block.

        A replica that joins while another phase is on finds the learner put aside; it is put aside again afterwards.
        """
        async with self.lock:
            before = self._resident
            if "weights" not in before:
                await self._reside(before | {"weights"})
            try:
                yield
            finally:
                if self._resident != before and self.ranks:
                    await self._reside(before)

    async def start(self) -> None:
        """Loads the model and joins the process group on every rank."""
        await self.call("start")

    async def update(self, groups: Sequence[GroupHandle]) -> Mapping[str, float]:
        """See ``Learner.update``; groups are shared out over ranks by tokens."""
        self._require_ranks()
        shares = deal([group.num_tokens for group in groups], len(self.ranks))
        async with self.lock:
            with self._metered(groups, self._num_epochs):
                results = await self.call("update", lambda rank: ([groups[i] for i in shares[rank]],))
        return dict(results[0])

    async def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        """Adds what this learner knows of each group: a critic its values, a policy its log-probs and the reference's.

        See ``LearnerWorker.annotate``; groups are shared out over ranks by tokens and come back in their order.
        """
        self._require_ranks()
        shares = deal([group.num_tokens for group in groups], len(self.ranks))
        async with self.lock:
            with self._metered(groups):
                results = await self.call("annotate", lambda rank: ([groups[i] for i in shares[rank]],))
        annotated: dict[int, GroupHandle] = {}
        for share, part in zip(shares, results, strict=True):
            annotated |= dict(zip(share, part, strict=True))
        return [annotated[i] for i in range(len(groups))]

    @contextlib.contextmanager
    def _metered(self, groups: Sequence[GroupHandle], times: int = 1) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._meter(self.role, times * sum(group.num_tokens for group in groups), time.monotonic() - began)

    async def save(self, place: str) -> Mapping[str, FileEntry]:
        """See ``Learner.save``."""
        async with self.lock:
            written = await self.call("save", lambda rank: (place,))
        return {name: entry for files in written for name, entry in files.items()}

    async def begin_save(self, place: str) -> None:
        """See ``Learner.begin_save``."""
        async with self.lock:
            await self.call("begin_save", lambda rank: (place,))

    async def saved(self, wait_s: float = 0.0) -> SaveStatus:
        """See ``Learner.saved``; a fault of one rank is told at once."""
        async with self.lock:
            states: list[SaveStatus] = await self.call("saved", lambda rank: (wait_s,))
        if fault := next((state.fault for state in states if state.fault), ""):
            return SaveStatus(fault=fault)
        if any(state.files is None for state in states):
            return SaveStatus()
        return SaveStatus({name: entry for state in states for name, entry in (state.files or {}).items()})

    async def verify(self, place: str, files: Mapping[str, FileEntry]) -> str:
        """See ``Learner.verify``; each rank reads what it will load, all at once."""
        async with self.lock:
            faults = await self.call("verify", lambda rank: (place, files))
        return next((fault for fault in faults if fault), "")

    async def load(self, place: str) -> None:
        """See ``Learner.load``."""
        async with self.lock:
            await self.call("load", lambda rank: (place,))

    async def export(self, directory: Path) -> None:
        """See ``Learner.export``."""
        async with self.lock:
            await self.call("export", lambda rank: (directory,))

    async def stop(self) -> None:
        """Leaves the process group and ends the ranks."""
        with contextlib.suppress(RlhfError):  # they are ended either way
            await self.call("stop")
        self.kill()
