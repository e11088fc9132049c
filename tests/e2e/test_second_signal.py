"""A second signal ends a run without waiting for the step: no stage may hold the driver, and no process stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import recipes

FOREVER = 10**6
BUSY = {"sft": "ray::RayTrainWorker", "rl": "ray::LearnerWorker.update"}
"""Title of the worker that does a stage's first step, by kind of stage."""


def stage(kind: str) -> dict[str, Any]:
    """A stage whose first step takes longer than any test."""
    if kind == "sft":
        return {
            "kind": "sft",
            "data": {"path": "records.jsonl"},
            "learner": recipes.learner() | {"max_tokens_per_micro_batch": 1},
            "loop": {"groups_per_step": 8000},
        }
    return {
        "kind": "rl",
        "learner": recipes.learner(),
        "algorithm": {"name": "grpo", "num_epochs": FOREVER},
        "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
        "loop": {"steps": 2, "prompts_per_step": 4, "num_samples": 2},
    }


def write_recipe(folder: Path, model: Path, kind: str) -> Path:
    folder.mkdir()
    recipes.write_data(folder)
    rows = [{"instruction": "Write a review.", "output": f"I loved it {i}."} for i in range(8000)]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return recipes.write_recipe(folder, recipes.base(folder, model, [stage(kind)]))


def signal_twice(driver: subprocess.Popen[str], kind: str, run: Path) -> int:
    """Sends the second signal once the first one was taken note of, in the middle of a step; returns the exit code."""

    def is_busy() -> bool:
        return any(title.startswith(BUSY[kind]) for title in recipes.titles_below(driver.pid))

    recipes.wait_for(driver, is_busy)
    os.kill(driver.pid, signal.SIGTERM)
    recipes.wait_for(driver, lambda: (run / "control" / "stop").exists())
    os.kill(driver.pid, signal.SIGTERM)
    return driver.wait(120)


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_a_second_signal_does_not_wait_for_the_step(tmp_path: Path, tiny_model_dir: Path) -> None:
    found = {kind: write_recipe(tmp_path / kind, tiny_model_dir, kind) for kind in BUSY}
    with contextlib.ExitStack() as stack:  # side by side: what takes time is how both of them start
        drivers = {}
        for kind, recipe in found.items():
            drivers[kind] = stack.enter_context(recipes.running(recipe))
            recipes.wait_for_cluster(drivers[kind], recipe.parent / "run")
        codes = {kind: signal_twice(drivers[kind], kind, recipe.parent / "run") for kind, recipe in found.items()}
    recipes.assert_gone(found["sft"])
    for kind, recipe in found.items():
        run, log = recipe.parent / "run", recipes.log_of(recipe)
        assert codes[kind] == 128 + signal.SIGTERM, log
        assert recipes.metrics(run, kind) == [], "the step was not waited for"
        assert not (run / "stages" / f"{kind}.json").exists()
        [stopped] = recipes.events(run, "stopped")
        assert stopped["signal"] == "SIGTERM"
        assert "Traceback" not in log
