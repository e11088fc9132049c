"""The generation worker's event loop: nothing that waits for another process may hold it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np

from actors.generation import GenerationWorker
from actors.vllm.config import EngineConfig
from rlhf.sampling import SamplingConfig
from rlhf.types import Completion, Prompt, RolloutGroup, VersionSpan
from tests.actors.vllm.engines import draw


class InstantEngine:
    """Draws one token for each request; stands where vLLM stands."""

    async def reside(self, parts):
        pass

    async def sample(self, requests, sampling, *, version, exact=False):
        for request in requests:
            tokens = np.array([len(request.name)], np.int32)
            yield Completion(tokens, np.zeros(1, np.float32), request.name, "stop", (VersionSpan(0, 0, 1),))


class SlowOwner:
    """A store whose owner takes a group only when it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.answer = threading.Event()
        self.kept: list[str] = []

    def put(self, value: RolloutGroup) -> Any:
        self.asked.set()
        assert self.answer.wait(30), "nobody told the owner to answer"
        self.kept.append(value.prompt.uid)
        return value

    def get(self, handle: Any) -> Any:
        return handle


def make_worker(store: Any) -> GenerationWorker:
    worker = GenerationWorker(Path("model"), EngineConfig(), SamplingConfig(max_tokens=1), 0, store)
    worker._engine = InstantEngine()  # type: ignore[assignment]
    return worker


PROMPTS = [Prompt(f"p{i}", (), (1, 2)) for i in range(4)]


def test_other_calls_are_answered_while_a_group_waits_for_its_owner() -> None:
    async def body() -> None:
        store = SlowOwner()
        worker = make_worker(store)
        drawing = asyncio.create_task(draw(worker, PROMPTS, 2, 0))
        try:
            while not store.asked.is_set():
                assert not drawing.done(), drawing.result()
                await asyncio.sleep(0.001)
            await asyncio.wait_for(worker.reside(()), 10)  # with the loop held, this line is never reached
            assert not drawing.done() and store.kept == []
        finally:
            store.answer.set()
        groups = await asyncio.wait_for(drawing, 30)
        assert [group.uid for group in groups] == store.kept == ["p0", "p1", "p2", "p3"]
        for group in groups:
            assert [r.completion.text for r in group.payload.rollouts] == [f"{group.uid}#0", f"{group.uid}#1"]

    asyncio.run(asyncio.wait_for(body(), 60))
