"""The driver of a run on a joined cluster of two nodes is killed in the middle of reinforcement learning."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.runs.metrics import read_metrics
from tests.drills.times import step_after
from tests.e2e import recipes
from tests.joined import joined_cluster

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, PROMPTS, SAMPLES = 8, 4, 3
ROLES = ("GenerationWorker", "LearnerWorker", "RecorderWorker", "Keeper")


@pytest.mark.timeout(1800)
def test_the_next_driver_takes_engines_and_learners_over(
    tmp_path: Path, tiny_model_dir: Path, tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the driver between two checkpoints, its gang of two ranks on two nodes; the command is run again.

    Passes if the second driver works with the very processes of the first, learners included, ends with 0, and metrics,
    rollouts and policy are equal to an undisturbed run's, bit for bit: each prompt once, and nothing of what the killed
    driver had trained after its last checkpoint. When it has ended nothing of the run is left on the cluster.
    """
    recipes.write_data(tmp_path)
    with joined_cluster({"num_cpus": 4}, {"num_cpus": 4}) as cluster:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, cluster.environment[name])
        path = recipes.write_recipe(tmp_path, _recipe(tmp_path, tiny_model_dir, cluster.address))
        run, whole = tmp_path / "run", tmp_path / "whole"
        with recipes.running(path) as driver:
            assert driver.wait(900) == 0, recipes.log_of(path)
        _wait_until_gone(path)
        shutil.move(run, whole)

        with recipes.running(path) as driver:
            recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 5, poll_s=0.01)
            before = _workers(path)
            driver.kill()
            driver.wait(30)
        logged = len(recipes.metrics(run))
        time.sleep(2.0)  # what it had under way goes on meanwhile
        assert _workers(path) == before and all(before.values())
        began = time.time()
        with recipes.running(path) as driver:
            recipes.wait_for(driver, lambda: recipes.has_event(run, "stage_resumed"))
            recipes.wait_for(driver, lambda: bool(_steps_after(run, began)), poll_s=0.01)
            during = _workers(path)
            assert driver.wait(900) == 0, recipes.log_of(path)
        _wait_until_gone(path)

    assert during == before, "not one of them was started anew"
    [reattached] = recipes.events(run, "driver_reattached")
    assert reattached["num_actors"] == 5 and reattached["silent_s"] > 0, "recorder, engine, rules and two ranks"
    assert {event["role"] for event in recipes.events(run, "replica_adopted")} == {"generation", "recorder"}
    [gang] = recipes.events(run, "gang_adopted")
    assert (gang["role"], gang["num_ranks"]) == ("learner", 2)
    [resumed] = recipes.events(run, "stage_resumed")
    assert 2 <= resumed["step"] <= logged and resumed["step"] % 2 == 0
    recovered = step_after(run, "rl", began) - began
    tell("SIGKILL of a joined cluster's driver in rl", recover_s=recovered, lost_steps=logged - resumed["step"])

    assert recipes.metrics(run) == recipes.metrics(whole)
    rows = recipes.table(run, "rollouts")
    assert rows == recipes.table(whole, "rollouts")
    assert Counter(Counter(row["uid"] for row in rows).values()) == {SAMPLES: STEPS * PROMPTS}
    assert {(row["step"], span["version"]) for row in rows for span in row["version_spans"]} == {
        (step, step) for step in range(STEPS)
    }
    for file in (whole / "policy").glob("*.safetensors"):
        assert (run / "policy" / file.name).read_bytes() == file.read_bytes()


def _recipe(folder: Path, model: Path, address: str) -> dict[str, Any]:
    stage = {
        "kind": "rl",
        "select_best": False,
        "learner": recipes.learner() | {"deepspeed": {"zero_stage": 2}},
        "algorithm": {"name": "grpo"},
        "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
        "loop": {"steps": STEPS, "prompts_per_step": PROMPTS, "num_samples": SAMPLES, "checkpoint_every": 2},
    }
    recipe = recipes.base(folder, model, [stage])
    recipe["sampling"] = {"max_tokens": 48, "ignore_eos": True}  # long enough to be killed in the middle
    recipe["roles"]["learner"] = {"ranks": 2, "resources": {"cpus": 0.1, "threads": 1, "strategy": "STRICT_SPREAD"}}
    recipe["ray"] = {"address": address}
    return recipe


def _workers(recipe: Path) -> dict[str, list[int]]:
    """Processes of the run on the cluster, those of its engine included."""
    found = {role: sorted(recipes.workers(recipe, f"ray::{role}")) for role in ROLES}
    return found | {"engine": sorted(recipes.workers(recipe, "VLLM::"))}


def _wait_until_gone(recipe: Path, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any(left := _workers(recipe).values()):
        assert time.monotonic() < deadline, f"left behind: {[psutil.Process(p).cmdline() for ids in left for p in ids]}"
        time.sleep(0.2)


def _steps_after(run: Path, moment: float) -> list[int]:
    """Steps that were logged since then."""
    return [line["step"] for line in read_metrics(run / "metrics.jsonl", "rl") if line["time"] > moment]
