"""A second signal ends a run without waiting for the step: no stage may hold the driver, and no process stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e import recipes

FOREVER = 10**6


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


def titles_below(pid: int) -> list[str]:
    """Titles of all processes that descend from one."""
    titles = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
    return titles


@pytest.mark.engine
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("kind", "busy"), [("sft", "ray::RayTrainWorker"), ("rl", "ray::LearnerWorker.update")])
def test_a_second_signal_does_not_wait_for_the_step(kind: str, busy: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
    rows = [{"instruction": "Write a review.", "output": f"I loved it {i}."} for i in range(8000)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, [stage(kind)]))
    run = tmp_path / "run"
    driver = recipes.start(recipe)
    try:
        recipes.wait_for(driver, lambda: any(title.startswith(busy) for title in titles_below(driver.pid)), 600.0)
        os.kill(driver.pid, signal.SIGTERM)
        recipes.wait_for(driver, lambda: (run / "control" / "stop").exists())  # the first one was taken note of
        os.kill(driver.pid, signal.SIGTERM)
        assert driver.wait(120) == 128 + signal.SIGTERM, recipes.log_of(recipe)
    finally:
        driver.kill()
        recipes.assert_gone(recipe)
    assert recipes.metrics(run, kind) == [], "the step was not waited for"
    assert not (run / "stages" / f"{kind}.json").exists()
    [stopped] = [
        event
        for line in (run / "events.jsonl").read_text().splitlines()
        if (event := json.loads(line))["kind"] == "stopped"
    ]
    assert stopped["signal"] == "SIGTERM"
    assert "Traceback" not in recipes.log_of(recipe)
