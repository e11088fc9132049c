"""Bytes of a learner rank: hand-worked tables by ZeRO stage, dtype, offload and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.deepspeed.config import DeepSpeedConfig
from actors.settings import LearnerConfig
from cluster.plan.activations import Rows
from cluster.plan.learner_memory import Training, learner_parts, trained_of
from cluster.plan.parts import RESIDENT
from cluster.plan.shape import ModelShape, read_shape
from rlhf.models.settings import LoraConfig, ModelConfig

SHAPES = Path(__file__).resolve().parents[3] / "configs" / "gpu" / "shapes"
SMALL = ModelShape(vocabulary=1000, width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=128)
NUMBERS = SMALL.language_parameters
ROWS = Rows(256, 56, 200, targets=200)


def parts_of(shape: ModelShape = SMALL, *, ranks: int = 1, zero: dict[str, Any] | None = None, **model: Any) -> Any:
    config = LearnerConfig(model=ModelConfig(**model), deepspeed=DeepSpeedConfig(**(zero or {})))
    training = Training(shape, "language_model", config, ranks, ROWS)
    return learner_parts(training, on_gpu=False)


def sums(parts: Any) -> dict[str, float]:
    """Bytes a number of the model, by name and place."""
    found: dict[str, float] = {}
    for part in parts:
        if part.kind in RESIDENT or part.kind == "host":
            name = f"{part.name} on host" if part.kind == "host" else part.name
            found[name] = round(found.get(name, 0.0) + part.size / NUMBERS, 6)
    return {name: size for name, size in found.items() if size}


BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
OFFLOAD = {"offload_optimizer": True}


@pytest.mark.parametrize(
    ("ranks", "zero", "model", "expected"),
    [
        (1, {}, FP32, {"weights": 4, "optimizer": 8, "gradients": 4}),
        (1, {}, BF16, {"weights": 2, "optimizer": 12, "gradients": 4}),
        (4, {}, BF16, {"weights": 2, "optimizer": 12, "gradients": 4}),
        (4, {"zero_stage": 1}, BF16, {"weights": 2, "optimizer": 3, "gradients": 4}),
        (4, {"zero_stage": 2}, BF16, {"weights": 2, "optimizer": 3, "gradients": 1}),
        (4, {"zero_stage": 2}, FP32, {"weights": 4, "optimizer": 3, "gradients": 1}),
        (4, {"zero_stage": 3}, BF16, {"weights": 0.5, "optimizer": 3, "gradients": 1}),
        (4, {"zero_stage": 3}, FP32, {"weights": 1, "optimizer": 2, "gradients": 1}),
        (
            4,
            {"zero_stage": 2} | OFFLOAD,
            BF16,
            {"weights": 2, "gradients": 1, "optimizer on host": 3, "gradients on host": 1.5},
        ),
        (4, {"zero_stage": 3} | OFFLOAD, BF16, {"weights": 0.5, "optimizer on host": 3, "gradients on host": 2}),
        (
            4,
            {"zero_stage": 3, "offload_parameters": True} | OFFLOAD,
            BF16,
            {"weights on host": 0.5, "optimizer on host": 3, "gradients on host": 2},
        ),
    ],
)
def test_what_stays_by_stage(ranks: int, zero: dict, model: dict, expected: dict[str, float]) -> None:
    assert sums(parts_of(ranks=ranks, zero=zero, **model)) == expected


def test_an_adapter_keeps_the_weights_and_little_else() -> None:
    found = sums(parts_of(adapter=LoraConfig(rank=2)))
    share = 2 * 2 * (4 * 128 + 3 * 192) / NUMBERS
    assert found == pytest.approx({"weights": 2 + 2 * share, "optimizer": 12 * share, "gradients": 4 * share}, rel=1e-4)


def test_a_frozen_reference_counts_unless_an_adapter_is_switched_off_for_it() -> None:
    for model, expected in (({}, 2 * NUMBERS), ({"adapter": LoraConfig()}, 0)):
        config = LearnerConfig(model=ModelConfig(**model))
        parts = learner_parts(Training(SMALL, "language_model", config, 1, ROWS, keeps_reference=True), on_gpu=False)
        assert sum(part.size for part in parts if part.name == "reference") == expected


def test_a_publication_needs_a_bucket_or_the_largest_tensor() -> None:
    for bucket, expected in ((1e6, 1e6), (1.0, 2 * 64 * 1000)):
        training = Training(SMALL, "language_model", LearnerConfig(), 1, ROWS, bucket_bytes=bucket)
        assert [part.size for part in learner_parts(training, on_gpu=False) if part.kind == "publish"] == [expected]


def test_more_ranks_and_higher_stages_never_need_more() -> None:
    shape = read_shape(SHAPES / "Qwen2.5-7B-Instruct" / "config.json")
    resident = [
        sum(p.size for p in parts_of(shape, ranks=ranks, zero={"zero_stage": stage}) if p.kind in RESIDENT)
        for stage, ranks in ((0, 8), (1, 8), (2, 8), (3, 8), (3, 16))
    ]
    assert resident == sorted(resident, reverse=True)


def test_recomputed_layers_and_shorter_batches_need_less() -> None:
    def work(tokens: int, **model: Any) -> float:
        config = LearnerConfig(model=ModelConfig(**model))
        rows = Rows(tokens, 56, 200, targets=tokens)
        parts = learner_parts(Training(SMALL, "language_model", config, 1, rows), on_gpu=False)
        return sum(part.size for part in parts if part.kind == "work")

    assert work(4096, gradient_checkpointing=True) < work(4096)
    assert work(2048) < 0.6 * work(4096)


def test_sixteen_bytes_and_two_a_number_for_seven_billion() -> None:
    """ZeRO's table (arXiv:1910.02054, figure 1) has 16 with bf16 gradients; ours are fp32."""
    shape = read_shape(SHAPES / "Qwen2.5-7B-Instruct" / "config.json")
    resident = sum(part.size for part in parts_of(shape) if part.kind in RESIDENT)
    assert resident == 18 * trained_of(shape, ModelConfig(), "language_model").numbers
