"""The learner on one GPU: what it learns there is what it learns on a CPU, and it can make room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.actors.engine_ranks import run_ranks
from tests.gpu.learner_work import all_updates, copies
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu

BF16: dict[str, Any] = {"dtype": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": BF16,
    "zero2": BF16 | {"stage": 2},
    "zero3": BF16 | {"stage": 3},
    "paused bf16": BF16 | {"pauses": True},
    "paused zero2": BF16 | {"stage": 2, "pauses": True},
    "paused zero3": BF16 | {"stage": 3, "pauses": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("gpu") / "model")


@pytest.fixture(scope="module")
def on_gpu(model: Path) -> dict[str, Any]:
    [found] = run_ranks(1, all_updates, model, CASES, device="cuda")
    return found


@pytest.fixture(scope="module")
def on_cpu(model: Path) -> list[dict[str, float]]:
    [found] = run_ranks(1, all_updates, model, {"fp32": {}})
    return found["fp32"]["metrics"]


@pytest.mark.parametrize(("case", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("zero2", 2e-2), ("zero3", 2e-2)])
def test_updates_on_the_gpu_agree_with_fp32_on_the_cpu(case: str, tolerance: float, on_gpu, on_cpu) -> None:
    for found, exact in zip(on_gpu[case]["metrics"], on_cpu, strict=True):
        assert found["nll"] == pytest.approx(exact["nll"], rel=tolerance)
        assert found["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5 * tolerance)
        assert found["skipped"] == 0.0
    assert on_gpu[case]["metrics"][-1]["nll"] < on_gpu[case]["metrics"][0]["nll"]


@pytest.mark.parametrize("case", ["bf16", "zero2", "zero3"])
def test_making_room_frees_the_device_and_changes_nothing(case: str, on_gpu) -> None:
    straight, paused = on_gpu[case], on_gpu[f"paused {case}"]
    assert straight["metrics"] == paused["metrics"]
    assert all(np.array_equal(value, paused["weights"][name]) for name, value in straight["weights"].items())
    for tensors, before, after in paused["free"]:
        assert before - after >= 0.95 * tensors, "the libraries' own workspaces stay, all else is free"


def test_a_copy_from_the_device_is_what_was_copied(model: Path, tmp_path: Path) -> None:
    cases = {name: CASES[name] for name in ("bf16", "zero2", "zero3")}
    [found] = run_ranks(1, copies, model, tmp_path, cases, device="cuda")
    for name, result in found.items():
        assert result["copied"] == result["at once"], name
        assert result["fault"] == "", name
        assert result["again"] == pytest.approx(result["straight"], rel=1e-3), name
