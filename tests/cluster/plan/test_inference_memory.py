"""Bytes of engines, reward models and references: hand-worked."""

from __future__ import annotations

from typing import Any

import pytest

from actors.vllm.config import EngineConfig
from cluster.plan.devices import GIB
from cluster.plan.inference_memory import engine_memory, frozen_memory
from cluster.plan.parts import RESIDENT, RoleMemory
from cluster.plan.shape import read_shape
from rlhf.errors import PlacementError
from tests.cluster.plan.recipes import SHAPES

SEVEN = read_shape(SHAPES / "Qwen2.5-7B-Instruct" / "config.json")
NUMBERS = 7_615_616_512


def part(memory: RoleMemory, name: str) -> float:
    return sum(one.size for one in memory.parts if one.name == name)


def engine(device_gib: float | None = 80.0, **fields: Any) -> RoleMemory:
    device = None if device_gib is None else device_gib * GIB
    return engine_memory("generation", SEVEN, EngineConfig(**fields), device_bytes=device, bucket_bytes=1e6)


def test_an_engine_holds_weights_and_the_cache_that_it_is_told() -> None:
    memory = engine(kv_cache_gib=7.0, max_model_len=1024)
    assert part(memory, "weights") == 2 * NUMBERS
    assert part(memory, "KV cache") == 7 * GIB
    # 28 layers, keys and values of 4 heads of 128 in bf16: 57,344 bytes a token.
    assert memory.note == "56 KiB of cache a token, 128 sequences of 1024"


def test_without_a_size_the_cache_takes_what_is_left_of_the_share() -> None:
    memory = engine(kv_cache_gib=None, gpu_memory_utilization=0.5)
    published = part(memory, "bucket")
    assert sum(one.size for one in memory.parts) - published == pytest.approx(0.5 * 80 * GIB)
    assert published == 2 * 152_064 * 3584, "the largest tensor is larger than a bucket"


def test_pieces_share_weights_and_cache() -> None:
    one, four = engine(kv_cache_gib=4.0), engine(kv_cache_gib=4.0, tensor_parallel_size=4)
    assert part(four, "weights") == part(one, "weights") / 4
    assert "14 KiB of cache a token" in four.note
    seven = engine(kv_cache_gib=4.0, tensor_parallel_size=7)  # four heads of keys: three devices hold copies
    assert part(seven, "weights") > part(one, "weights") / 7
    assert "14 KiB of cache a token" in seven.note


def test_more_sequences_in_flight_need_room_for_their_logits() -> None:
    assert part(engine(max_num_seqs=2048), "activations") > part(engine(max_num_seqs=64), "activations")


@pytest.mark.parametrize("fields", [{"kv_cache_gib": 0.01}, {"kv_cache_gib": None, "gpu_memory_utilization": 0.18}])
def test_a_cache_too_small_for_one_sequence_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PlacementError) as caught:
        engine(**fields)
    assert caught.value.where == "role generation"
    assert caught.value.needed == "0.05 GiB for one sequence of 1024 tokens"


def test_on_a_cpu_nothing_of_cuda_counts() -> None:
    memory = engine(device_gib=None, kv_cache_gib=1.0)
    assert {one.name for one in memory.parts} == {"weights", "activations", "bucket", "KV cache"}


def test_a_reference_needs_logits_and_a_reward_model_does_not() -> None:
    sizes: dict[str, Any] = {"dtype": "bfloat16", "max_tokens": 8192, "on_gpu": False}
    reference = frozen_memory("reference", SEVEN, head="language_model", **sizes)
    scorer = frozen_memory("scorer", SEVEN, head="scalar", **sizes)
    assert part(reference, "weights") - part(scorer, "weights") == 2 * (152_064 - 1) * 3584
    assert part(reference, "activations") > 2 * 8192 * 152_064 > part(scorer, "activations")
    wide = frozen_memory("scorer", SEVEN, head="scalar", **sizes | {"dtype": "float32"})
    assert wide.size(RESIDENT) == 2 * scorer.size(RESIDENT)
