"""A real engine's cache: as many tokens as the plan says that fit its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.plan.inference_memory import engine_memory
from cluster.plan.shape import read_shape
from tests.actors.vllm.engines import ENGINE

pytestmark = pytest.mark.engine


def test_the_cache_holds_as_many_tokens_as_planned(generation, tiny_model_dir: Path) -> None:
    shape = read_shape(tiny_model_dir / "config.json")
    cache = generation.engine._link.llm.vllm_config.cache_config
    per_token = shape.kv_bytes_per_token(4)
    assert ENGINE.dtype == "float32" and ENGINE.kv_cache_gib is not None
    tokens = ENGINE.kv_cache_gib * 2**30 / per_token
    assert cache.num_gpu_blocks * cache.block_size == pytest.approx(tokens, rel=0.02)
    memory = engine_memory("generation", shape, ENGINE, device_bytes=None)
    assert memory.note == f"{per_token / 1024:.0f} KiB of cache a token, {tokens / 256:.0f} sequences of 256"
