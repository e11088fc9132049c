"""The generation engine's worker is killed, or its engine hangs, in the middle of a reinforcement-learning step."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.drills.times import event_after
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, PROMPTS, SAMPLES = 8, 8, 6


@pytest.mark.timeout(1800)
def test_a_run_outlives_its_generation_workers(tmp_path: Path, tiny_model_dir: Path, tell: Callable[..., None]) -> None:
    """Killed once while it draws and once while the learner updates, and with an engine that hangs while it draws (its
    processes are stopped, not killed), the one replica is replaced and the run goes on.

    Passes if the run ends with 0, every step is trained, each prompt exactly once with all its siblings, the record
    says that each step was drawn by its own weights version alone, and the events tell the losses, the joins and what
    was dispatched again, and that the hang was found by missed probes.
    """
    recipes.write_data(tmp_path, num_prompts=24)
    stages = [
        {
            "kind": "rl",
            "select_best": False,
            "learner": recipes.learner(),
            "algorithm": {"name": "grpo"},
            "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
            "loop": {"steps": STEPS, "prompts_per_step": PROMPTS, "num_samples": SAMPLES},
        }
    ]
    recipe = recipes.base(tmp_path, tiny_model_dir, stages)
    recipe["sampling"] = {"max_tokens": 96, "ignore_eos": True}  # long enough to be caught in the act
    recipe["roles"]["generation"]["engine"]["max_num_seqs"] = 12
    recipe["roles"]["generation"]["resources"] |= {"probe_every_s": 1.0, "probe_timeout_s": 10.0}
    path = recipes.write_recipe(tmp_path, recipe)
    run = tmp_path / "run"
    killed: dict[str, float] = {}

    with recipes.running(path) as driver:
        recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 2, poll_s=0.01)  # behind the publication
        before = recipes.engine_seconds(path)
        recipes.wait_for(driver, lambda: recipes.engine_seconds(path) > before + 0.05, poll_s=0.01)
        killed["while it draws"] = time.time()
        recipes.kill_worker(path, "ray::GenerationWorker")
        recipes.wait_for(driver, lambda: len(recipes.events(run, "replica_joined")) >= 3)  # rules, first, second
        recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 4)
        [learner] = recipes.workers(path, "ray::LearnerWorker")
        recipes.wait_for(driver, lambda: ".update" in " ".join(psutil.Process(learner).cmdline()), poll_s=0.002)
        killed["while the learner updates"] = time.time()
        recipes.kill_worker(path, "ray::GenerationWorker")
        recipes.wait_for(driver, lambda: len(recipes.events(run, "replica_joined")) >= 4)
        recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 6, poll_s=0.01)
        before = recipes.engine_seconds(path)
        recipes.wait_for(driver, lambda: recipes.engine_seconds(path) > before + 0.05, poll_s=0.01)
        killed["while it draws, by a hang of its engine"] = time.time()
        for pid in recipes.workers(path, "VLLM::"):
            os.kill(pid, signal.SIGSTOP)
        assert driver.wait(900) == 0, recipes.log_of(path)
    recipes.assert_gone(path)

    assert [line["step"] for line in recipes.metrics(run)] == list(range(1, STEPS + 1))
    rows = recipes.table(run, "rollouts")
    counts = Counter(row["uid"] for row in rows)
    assert len(counts) == STEPS * PROMPTS and set(counts.values()) == {SAMPLES}
    assert {(row["step"], span["version"]) for row in rows for span in row["version_spans"]} == {
        (step, step) for step in range(STEPS)
    }
    for act, moment in killed.items():
        lost_s, joined_s = (event_after(run, kind, moment) - moment for kind in ("replica_lost", "replica_joined"))
        tell(f"the generation worker is killed {act}", detect_s=lost_s, recover_s=joined_s, lost_steps=0)
    lost = recipes.events(run, "replica_lost")
    assert [event["role"] for event in lost] == ["generation"] * 3
    assert "no answer to two probes" in lost[2]["error"] and 20.0 <= lost[2]["detect_s"] < 600.0
    assert recipes.has_event(run, "replica_suspect")
    joined = [event["replica"] for event in recipes.events(run, "replica_joined") if event["role"] == "generation"]
    assert joined == [0, 1, 2, 3]
    redispatched = recipes.events(run, "redispatched")
    assert redispatched and 0 < redispatched[0]["num_items"] <= PROMPTS
