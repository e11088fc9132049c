"""The recorder is killed in the middle of a reinforcement-learning step."""

from __future__ import annotations

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
def test_a_run_outlives_its_recorder(tmp_path: Path, tiny_model_dir: Path, tell: Callable[..., None]) -> None:
    """Killed once while the engine draws and once while the learner updates, with all rollouts that it owned.

    Passes if the run ends with 0 without another driver, every step is trained, each prompt exactly once with all its
    siblings, the record says that each step was drawn by its own weights version alone, the recorder's losses and
    restarts are told, and no other role has lost anything.
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
    recipe["recorder"] = {"cpus": 0.1, "probe_every_s": 1.0}
    path = recipes.write_recipe(tmp_path, recipe)
    run = tmp_path / "run"
    killed: dict[str, float] = {}

    def kill(while_what: str) -> None:
        killed[while_what] = time.time()
        recipes.kill_worker(path, "ray::RecorderWorker")
        recipes.wait_for(driver, lambda: len(_of_recorder(run, "replica_joined")) >= len(killed))

    with recipes.running(path) as driver:
        recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 2, poll_s=0.01)  # behind the publication
        before = recipes.engine_seconds(path)
        recipes.wait_for(driver, lambda: recipes.engine_seconds(path) > before + 0.05, poll_s=0.01)
        kill("while the engine draws")
        logged = len(recipes.metrics(run))
        recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= min(logged + 1, STEPS - 2))
        [learner] = recipes.workers(path, "ray::LearnerWorker")
        recipes.wait_for(driver, lambda: ".update" in " ".join(psutil.Process(learner).cmdline()), poll_s=0.002)
        kill("while the learner updates")
        assert driver.wait(900) == 0, recipes.log_of(path)
    recipes.assert_gone(path)

    assert [line["step"] for line in recipes.metrics(run)] == list(range(1, STEPS + 1))
    rows = recipes.table(run, "rollouts")
    counts = Counter(row["uid"] for row in rows)
    assert len(counts) == STEPS * PROMPTS and set(counts.values()) == {SAMPLES}
    assert {(row["step"], span["version"]) for row in rows for span in row["version_spans"]} == {
        (step, step) for step in range(STEPS)
    }
    assert {event["role"] for event in recipes.events(run, "replica_lost")} == {"recorder"}
    assert not recipes.events(run, "gang_lost") and not recipes.events(run, "redispatched")
    joined = _of_recorder(run, "replica_joined")
    assert [event["replaces"] for event in joined] == [0, 1]
    for what, moment in killed.items():
        lost_s, joined_s = (event_after(run, kind, moment) - moment for kind in ("replica_lost", "replica_joined"))
        tell(f"the recorder is killed {what}", detect_s=lost_s, recover_s=joined_s, lost_steps=0)


def _of_recorder(run: Path, kind: str) -> list[dict[str, object]]:
    return [event for event in recipes.events(run, kind) if event["role"] == "recorder"]
