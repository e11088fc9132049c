"""A learner that makes room for others: bit for bit the same training at every ZeRO stage, and the memory is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.actors.engine_ranks import run_ranks
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.engine


def work(info: Any, model: Path, scratch: Path) -> dict[str, Any]:
    from tests.actors.memory_work import memory_cases

    return memory_cases(info, model, scratch)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_training_with_pauses_is_training(num_ranks: int, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model")
    for found in run_ranks(num_ranks, work, model, tmp_path / "scratch"):
        for name, case in found.items():
            assert case["same metrics"], name
            assert case["same weights"], name
            assert "weights in host memory" in case["refused"], name
            assert case["nothing"] <= 0.05 * case["whole"], (name, case)
            assert case["nothing"] < case["only weights"] < case["whole"], (name, case)
            assert 0.99 * case["whole"] < case["again"] <= case["whole"] + 64, (
                name,
                case,
            )  # what was gathered is not again
    assert all(case["num weights"] for case in found.values()) or num_ranks > 1
