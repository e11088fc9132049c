"""Weight updates of one engine, from the first bucket to serving the new version."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from actors.vllm.link import EngineLink
from rlhf.errors import DeadlineError, EngineError, PublicationError, RlhfError
from rlhf.weights import Bucket

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ResultT = TypeVar("ResultT")


class WeightUpdates:
    """Takes weights in: ``begin``, ``load`` for every bucket in order, ``finish``.

    Between ``begin`` and ``finish`` nothing is admitted and what is in flight stands still; then it goes on with the
    new weights (its cached keys and values are computed anew). An update that fails, is aborted or is not finished in
    time leaves a mixture of weights: requests in flight fail, and nothing is served until a whole update succeeded.

    Args:
        link: The engine.
        timeout_s: Longest time from ``begin`` to ``finish``.
    """

    def __init__(self, link: EngineLink, timeout_s: float) -> None:
        self._link = link
        self._timeout_s = timeout_s
        self._ends = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def begin(self, version: int) -> None:
        """Stops serving and opens the engine for buckets; an update that is still open is given up."""
        link = self._link
        await self.abort(f"its update was given up for one to version {version}")
        async with link.admission:
            llm = link.alive()
            if "weights" in link.asleep:
                raise link.failed("an engine whose weights are not in device memory")
            link.settled.clear()
            link.refuse(f"its update to version {version} has not finished")
            self._ends = time.monotonic() + self._timeout_s
            self._watch = asyncio.create_task(self._expire())
            await self._step(llm.pause_generation(mode="keep", clear_cache=True))
            await self._step(llm.start_weight_update())

    async def load(self, bucket: Bucket) -> None:
        """Hands one bucket to the worker, which verifies it before it loads anything of it.

        Raises:
            PublicationError: The bucket is out of order, altered or does not fit the model; the update is over.
        """
        llm = self._open()

        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        from actors.vllm.transfer import shared_file

        with shared_file(bucket) as path:
            await self._step(llm.update_weights(WeightTransferUpdateRequest(update_info={"path": path})))

    async def finish(self, version: int, digest: str) -> None:
        """Checks that the whole model arrived, and serves it.

        Args:
            version: Version of the new weights.
            digest: ``combine_digests`` of all buckets, from the sender.
        """
        llm = self._open()
        await self._step(llm.collective_rpc("rlhf_check_complete", args=(digest,)))
        await self._step(llm.finish_weight_update(weight_version=str(version)))
        if not self._link.asleep:
            await self._step(llm.resume_generation())
        self._link.version = version
        self._close()

    async def abort(self, why: str = "its update was aborted") -> None:
        """Gives an open update up, if there is one."""
        if self._link.settled.is_set():
            return
        self._link.refuse(why)
        try:
            if self._link.llm is not None and self._link.is_alive:
                await self._undo(self._link.llm)
        finally:
            self._close()

    async def _undo(self, llm: AsyncLLM) -> None:
        await self._link.call(llm.collective_rpc("rlhf_discard_update"), "end of an update")
        # Frozen requests cannot go on from a mixture of weights. Their callers see them aborted.
        await self._link.call(llm.pause_generation(mode="abort", clear_cache=True), "abort")
        await self._link.call(llm.resume_generation(), "resume")

    async def tensor_digests(self) -> dict[str, str]:
        """The digest of each tensor that the last update handed to the model, by Hugging Face name."""
        rows = await self._link.call(self._link.alive().collective_rpc("rlhf_tensor_digests"), "tensor digests")
        return dict(rows[0])

    def cancel(self) -> None:
        """Forgets an open update without asking the engine, which is about to stop."""
        self._close()

    async def _expire(self) -> None:
        await asyncio.sleep(self._ends - time.monotonic())
        await self.abort(f"its update did not finish in {self._timeout_s:g} s")

    def _close(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
        self._link.settled.set()

    def _open(self) -> AsyncLLM:
        llm = self._link.alive()
        if self._link.settled.is_set():
            raise self._broken("no open update: none was begun, or it failed, or its time was over")
        return llm

    async def _step(self, call: Awaitable[ResultT]) -> ResultT:
        """One call within the update's time; whatever fails ends the update."""
        left = max(self._ends - time.monotonic(), 0.001)
        try:
            return await self._link.call(call, "weight update", left)
        except RlhfError as error:
            alive = self._link.is_alive
            await self.abort(f"its update failed with {error.found}")
            if isinstance(error, DeadlineError):
                raise self._broken(f"no end of the update after {self._timeout_s:g} s") from None
            if isinstance(error, EngineError) and alive:
                raise self._broken(error.found) from error
            raise

    def _broken(self, found: str) -> PublicationError:
        return PublicationError(
            self._link.name,
            found=found,
            needed="a whole, unaltered model, in order and in time",
            action="Publish the weights again.",
        )
