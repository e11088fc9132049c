"""What an engine is told when others need its memory. On a CPU vLLM frees nothing (``tests/gpu`` sees it do so)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.vllm.config import EngineConfig
from actors.vllm.engine import VllmEngine
from actors.vllm.link import EngineLink
from actors.vllm.update import WeightUpdates
from rlhf.errors import EngineError, PublicationError
from tests.actors.vllm.engines import RunningWorker, make_buckets, texts_and_bits, weights_of

BOTH = ("kv_cache", "weights")


class SleepingLlm:
    """Sleeps and wakes as vLLM's executor does, its refusals included; only what this test needs."""

    errored = False

    def __init__(self) -> None:
        self.sleeping: set[str] = set()
        self.calls: list[str] = []
        self.failing = ""

    async def _enter(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0)
        if name.startswith(self.failing or "-"):
            raise RuntimeError(name)

    async def sleep(self, level: int, mode: str) -> None:
        await self._enter(f"sleep {level} {mode}")
        if "weights" not in self.sleeping:
            self.sleeping = {*BOTH}

    async def wake_up(self, tags: list[str]) -> bool:
        await self._enter(f"wake {' '.join(tags)}")
        if set(tags) <= self.sleeping:  # vLLM wakes nothing where one of the tags is awake
            self.sleeping -= set(tags)
        return not self.sleeping

    async def resume_generation(self) -> None:
        await self._enter("resume")


class PlainLink(EngineLink):
    """Without vLLM's own errors, which take long to import."""

    async def call(self, call, what, timeout_s=5.0):
        try:
            return await asyncio.wait_for(call, timeout_s)
        except RuntimeError as error:
            raise self.failed(str(error)) from error


def start(enable_sleep: bool = True) -> tuple[VllmEngine, SleepingLlm]:
    engine = VllmEngine(Path("model"), EngineConfig(enable_sleep=enable_sleep))
    engine._link = PlainLink("engine")
    engine.weights = WeightUpdates(engine._link, 5.0)
    engine._link.llm = llm = SleepingLlm()
    engine._link.version = 0
    return engine, llm


def test_each_way_from_one_set_of_parts_to_another() -> None:
    async def body() -> None:
        engine, llm = start()
        steps: list[tuple[tuple[str, ...], list[str]]] = [
            (BOTH, []),
            ((), ["sleep 1 keep"]),
            ((), []),
            (("weights",), ["wake weights"]),
            (("weights",), []),
            (BOTH, ["wake kv_cache", "resume"]),
            (("weights",), ["sleep 1 keep", "wake weights"]),
            ((), ["sleep 1 keep"]),
            (BOTH, ["wake kv_cache weights", "resume"]),
        ]
        for parts, calls in steps:
            llm.calls.clear()
            await engine.reside(parts)
            assert llm.calls == calls
            assert llm.sleeping == {*BOTH} - set(parts)
            if set(parts) == {*BOTH}:
                engine._link.check_serving(0)
            else:
                with pytest.raises(EngineError, match="in device memory"):
                    engine._link.check_serving(0)

    asyncio.run(body())


@pytest.mark.parametrize("failing", ["sleep", "wake"])
def test_a_failure_leaves_an_engine_that_does_not_serve(failing: str) -> None:
    async def body() -> None:
        engine, llm = start()
        llm.failing = failing
        with pytest.raises(EngineError, match=failing):
            await engine.reside(())
            await engine.reside(BOTH)
        with pytest.raises(EngineError, match="in device memory"):
            engine._link.check_serving(0)

    asyncio.run(body())


def test_an_update_is_refused_while_the_weights_are_aside() -> None:
    async def body() -> None:
        engine, _ = start()
        await engine.reside(())
        with pytest.raises(EngineError, match="weights are not in device memory"):
            await engine.weights.begin(1)

    asyncio.run(body())


def test_nothing_happens_where_sleep_is_not_enabled() -> None:
    async def body() -> None:
        engine, llm = start(enable_sleep=False)
        await engine.reside(())
        assert llm.calls == []
        engine._link.check_serving(0)

    asyncio.run(body())


@pytest.mark.engine
def test_a_real_engine_sleeps_takes_weights_while_its_cache_is_away_and_draws_the_same(generation: RunningWorker):
    worker = generation.worker
    before = texts_and_bits(generation.generate(version=0))
    generation.run(worker.reside(()))
    with pytest.raises(EngineError, match="kv_cache and weights in device memory"):
        generation.generate(version=0)
    with pytest.raises(EngineError, match="weights are not in device memory"):
        generation.publish(make_buckets(weights_of(generation.model)))
    generation.run(worker.reside(("weights",)))
    generation.publish(make_buckets(weights_of(generation.model)))
    with pytest.raises(EngineError, match="kv_cache in device memory"):
        generation.generate()
    generation.run(worker.reside(BOTH))
    assert texts_and_bits(generation.generate(version=0)) == before
    generation.run(worker.reside(("weights",)))
    with pytest.raises(PublicationError):
        generation.publish(make_buckets(weights_of(generation.model))[1:])
    generation.run(worker.reside(BOTH))
    with pytest.raises(EngineError, match="serves nothing"):
        generation.generate()
    generation.reset()
    assert texts_and_bits(generation.generate(version=0)) == before
