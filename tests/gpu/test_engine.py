"""vLLM on one GPU: sleep gives memory back, waking restores every bit, and weights arrive while the cache is away."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.generation import GenerationWorker
from actors.store import LocalStore
from rlhf.errors import EngineError, PublicationError
from rlhf.sampling import SamplingConfig
from tests.actors.vllm.engines import ENGINE, RunningWorker, make_buckets, texts_and_bits, weights_of
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu

KV_CACHE_GIB = 2.0
BOTH = ("weights", "kv_cache")


def greedy_worker(model: Path) -> GenerationWorker:
    """May sleep, and always takes the likeliest token."""
    changes = {"enable_sleep": True, "kv_cache_gib": KV_CACHE_GIB, "gpu_memory_utilization": 0.5}
    sampling = SamplingConfig(max_tokens=24, temperature=0.0)
    return GenerationWorker(model, ENGINE.model_copy(update=changes), sampling, 11, LocalStore())


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    model = build_tiny_model(tmp_path_factory.mktemp("gpu") / "model")
    running = RunningWorker(model, greedy_worker(model))
    yield running
    running.stop()


def test_sleep_frees_the_cache_and_waking_restores_the_output_bit_for_bit(worker: RunningWorker) -> None:
    before = texts_and_bits(worker.generate())
    awake = used_bytes()
    worker.run(worker.worker.reside(()))
    asleep = used_bytes()
    worker.run(worker.worker.reside(("weights",)))
    without_cache = used_bytes()
    worker.run(worker.worker.reside(BOTH))
    assert awake - asleep > 0.9 * KV_CACHE_GIB * 2**30
    assert awake - without_cache > 0.9 * KV_CACHE_GIB * 2**30
    assert texts_and_bits(worker.generate()) == before


def test_weights_from_the_cpu_arrive_with_and_without_the_cache(worker: RunningWorker, tmp_path: Path) -> None:
    old, new = weights_of(worker.model), weights_of(build_tiny_model(tmp_path / "other", seed=5))
    worker.publish(make_buckets(old))
    first = texts_and_bits(worker.generate())
    worker.publish(make_buckets(new))
    second = texts_and_bits(worker.generate())
    assert second != first

    worker.run(worker.worker.reside(()))
    worker.run(worker.worker.reside(("weights",)))
    worker.publish(make_buckets(old))
    worker.run(worker.worker.reside(BOTH))
    assert texts_and_bits(worker.generate()) == first
    assert dict(worker.run(worker.worker.tensor_digests())).keys() == old.keys()


def test_an_update_that_fails_while_the_cache_is_away_leaves_an_engine_that_recovers(worker: RunningWorker) -> None:
    old = make_buckets(weights_of(worker.model))
    worker.publish(old)
    expected = texts_and_bits(worker.generate())
    worker.run(worker.worker.reside(("weights",)))
    broken = [dataclasses.replace(old[0], digest="0" * 64), *old[1:]]
    with pytest.raises(PublicationError):
        worker.publish(broken)
    worker.run(worker.worker.reside(BOTH))
    with pytest.raises(EngineError):
        worker.generate()
    worker.publish(old)
    assert texts_and_bits(worker.generate()) == expected
