"""The line to an engine's process: calls with a deadline, and the state that decides whether it may serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from rlhf.errors import DeadlineError, EngineError, RlhfError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ResultT = TypeVar("ResultT")

CONTROL_TIMEOUT_S = 120.0
"""For short calls to the engine process: pause, resume, submit, cache reset."""


class EngineLink:
    """State shared by the parts of one engine.

    Attributes:
        name: For errors.
        llm: vLLM's client; None before start and after stop.
        version: Version of the weights that are served; None while nothing may be served.
        settled: Clear while a weight update is under way.
        admission: Held while requests are submitted, and while an update begins.
        asleep: Parts whose GPU memory was given back.
        num_abandoned: Times that all work was given up; who waited over one of them is not admitted any more.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.llm: AsyncLLM | None = None
        self.version: int | None = None
        self.settled = asyncio.Event()
        self.settled.set()
        self.admission = asyncio.Lock()
        self.asleep: frozenset[str] = frozenset()
        self.num_abandoned = 0
        self._why_not = "it has not been started"

    @property
    def is_alive(self) -> bool:
        """Whether there is an engine process to talk to."""
        return self.llm is not None and not self.llm.errored

    def alive(self) -> AsyncLLM:
        """Returns vLLM's client, or raises ``EngineError`` where its process is gone."""
        if self.llm is None:
            raise self.failed(f"an engine that cannot be used: {self._why_not}")
        if self.llm.errored:
            self.refuse("its process died")
            raise self.failed("that its process died")
        return self.llm

    def check_serving(self, version: int, *, exact: bool = False) -> None:
        """Raises ``EngineError`` unless weights of ``version`` (or later, where not ``exact``) are served."""
        self.alive()
        if self.version is None:
            raise self.failed(f"an engine that serves nothing: {self._why_not}")
        if self.asleep:
            raise self.failed(f"an engine without its {' and '.join(sorted(self.asleep))} in device memory")
        if self.version < version or (exact and self.version != version):
            raise EngineError(
                self.name,
                found=f"weights of version {self.version}",
                needed=f"version {version}",
                action="Publish the weights to this replica before it is used.",
            )

    def refuse(self, why: str) -> None:
        """Serves nothing from here on, until a weight update succeeds."""
        self.version = None
        self._why_not = why

    async def call(self, call: Awaitable[ResultT], what: str, timeout_s: float = CONTROL_TIMEOUT_S) -> ResultT:
        """Waits for the engine process and gives its failures our types.

        Raises:
            DeadlineError: No answer in time.
            EngineError: The process died, or what it was asked for failed.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 can swallow the cancellation of its caller
                return await call
        except TimeoutError:
            raise self.deadline(what, timeout_s) from None
        except EngineDeadError as error:
            self.refuse("its process died")
            raise self.failed(f"that its process died during {what}") from error
        except RlhfError:
            raise
        except Exception as error:  # vLLM re-raises whatever failed in its process as a bare Exception
            text = str(error).partition(" method failed: ")[2] or f"{type(error).__name__}: {error}"
            raise self.failed(f"a failed {what} ({text})") from error

    @asynccontextmanager
    async def paused(self, *, clear_cache: bool) -> AsyncIterator[AsyncLLM]:
        """Holds the scheduler still: what is submitted meanwhile starts together."""
        llm = self.alive()
        try:  # from before the pause: a caller that leaves while it waits for it would leave the engine standing
            await self.call(llm.pause_generation(mode="keep", clear_cache=clear_cache), "pause")
            yield llm
        finally:
            if self.is_alive:
                await self.call(llm.resume_generation(), "resume")

    def failed(self, found: str) -> EngineError:
        """The error of an engine that does not do its work."""
        return EngineError(
            self.name,
            found=found,
            needed="a running engine with whole weights",
            action="See the engine's log; the replica is replaced and its prompts are dispatched again.",
        )

    def deadline(self, what: str, timeout_s: float) -> DeadlineError:
        """The error of an engine that does not answer."""
        return DeadlineError(
            f"{self.name}: {what}",
            found=f"no end after {timeout_s:g} s",
            needed="an answer in time",
            action="Raise the timeout in the engine section, or see what kept the engine's cores busy.",
        )
