"""The line to an engine: a caller that leaves never leaves the engine standing still."""

from __future__ import annotations

import asyncio

import pytest

from actors.vllm.link import EngineLink

pytestmark = pytest.mark.engine  # importing vLLM takes as long as an engine


class SlowToPause:
    """Counts pauses less resumes; a pause takes effect at once and is answered late."""

    errored = False

    def __init__(self) -> None:
        self.standing = 0
        self.asked = asyncio.Event()

    async def pause_generation(self, **_: object) -> None:
        self.standing += 1
        self.asked.set()
        await asyncio.sleep(60)

    async def resume_generation(self) -> None:
        self.standing -= 1


def test_a_caller_that_leaves_while_the_engine_is_being_paused_lets_it_go_on() -> None:
    async def body() -> None:
        link = EngineLink("engine")
        link.llm = llm = SlowToPause()  # type: ignore[assignment]

        async def admit() -> None:
            async with link.paused(clear_cache=False):
                raise AssertionError("the pause was never answered")

        call = asyncio.create_task(admit())
        await llm.asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert llm.standing == 0

    asyncio.run(asyncio.wait_for(body(), 30))
