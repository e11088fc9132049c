"""A synchronous fp32 run repeats bit for bit, also when its driver or its learner is killed or stopped in between.

Two runs of one recipe go on side by side. Where one is disturbed the other has not been yet: what the second one does
before its signal is what an undisturbed run does, and the first one is killed twice before that. The first one writes
its checkpoints in the background, the second one at once.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rlhf.runs import checkpoint
from tests.e2e import recipes

STEPS, CHECKPOINT_EVERY = 20, 5
DRIVER_KILLED, LEARNER_KILLED, STOPPED = 6, 11, 14


def write_recipe(folder: Path, model: Path, *, in_background: bool) -> Path:
    """The recipe of both runs; one thread a role, so that each run has a core of its own where there are two."""
    folder.mkdir()
    recipes.write_data(folder)
    stages = [
        {
            "kind": "rl",
            "select_best": False,
            "learner": recipes.learner(),
            "algorithm": {"name": "grpo", "policy": {"kl": {"coefficient": 0.1}}},
            "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}], "normalise": True}],
            "validation_prompts": 4,
            "loop": {
                "steps": STEPS,
                "prompts_per_step": 4,
                "num_samples": 2,
                "checkpoint_every": CHECKPOINT_EVERY,
                "evaluate_every": 10,
            },
        }
    ]
    recipe = recipes.base(folder, model, stages) | {"checkpoints": {"in_background": in_background}}
    for role in recipe["roles"].values():
        role["resources"]["threads"] = 1
    return recipes.write_recipe(folder, recipe)


def steps_done(recipe: Path) -> int:
    return len(recipes.metrics(recipe.parent / "run"))


def has_saved(recipe: Path, step: int) -> bool:
    """Whether a checkpoint of that step or a later one exists; written in the background it comes a little later."""
    return any(found >= step for found in checkpoint.steps(recipe.parent / "run" / "checkpoints" / "rl"))


def kill_learner_of(driver: int) -> None:
    """Sends SIGKILL to the learner below one driver; the other run has one too."""
    found = [child for child in psutil.Process(driver).children(recursive=True) if _is_learner(child)]
    assert found, "no learner below the driver"
    for process in found:
        process.kill()


def _is_learner(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::LearnerWorker")
    except psutil.Error:
        return False


def killed_twice(recipe: Path) -> None:
    """Its driver is killed, then the learner of the run that goes on; that one is done in the end."""
    run = recipe.parent / "run"
    with recipes.running(recipe) as driver:
        saved = CHECKPOINT_EVERY
        code = recipes.kill_when(
            driver, lambda: steps_done(recipe) >= DRIVER_KILLED and has_saved(recipe, saved), sign=signal.SIGKILL
        )
        assert code == -signal.SIGKILL
    assert not (run / "stages" / "rl.json").exists()
    with recipes.running(recipe) as driver:
        recipes.wait_for(driver, lambda: recipes.has_event(run, "stage_resumed"))
        saved = 2 * CHECKPOINT_EVERY
        recipes.wait_for(driver, lambda: steps_done(recipe) >= LEARNER_KILLED and has_saved(recipe, saved))
        kill_learner_of(driver.pid)
        assert driver.wait(900) == 0, recipes.log_of(recipe)


def stopped(recipe: Path) -> None:
    """It is told to stop, and is done when it is run again."""
    with recipes.running(recipe) as driver:
        recipes.wait_for(driver, lambda: steps_done(recipe) >= STOPPED)
        os.kill(driver.pid, signal.SIGTERM)
        assert driver.wait(300) == 128 + signal.SIGTERM, recipes.log_of(recipe)
    with recipes.running(recipe) as driver:
        assert driver.wait(900) == 0, recipes.log_of(recipe)


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_killed_and_stopped_runs_have_the_same_bits(tmp_path: Path, tiny_model_dir: Path) -> None:
    first = write_recipe(tmp_path / "killed", tiny_model_dir, in_background=True)
    second = write_recipe(tmp_path / "stopped", tiny_model_dir, in_background=False)
    with ThreadPoolExecutor(2) as pool:
        lives = [pool.submit(killed_twice, first)]
        while not recipes.has_event(first.parent / "run", "stage_started") and not lives[0].done():
            time.sleep(0.1)  # Ray has to start within a time of its own, so one cluster starts after the other
        lives.append(pool.submit(stopped, second))
        for life in lives:
            life.result()
    recipes.assert_gone(first)
    killed, whole = first.parent / "run", second.parent / "run"

    driver_s, learner_s = (event["step"] for event in recipes.events(killed, "stage_resumed"))
    assert CHECKPOINT_EVERY <= driver_s < learner_s, "each went on behind the newest checkpoint"
    assert len(recipes.events(killed, "gang_lost")) == 1
    [told] = recipes.events(whole, "stopped")
    assert told["signal"] == "SIGTERM"
    [resumed] = recipes.events(whole, "stage_resumed")
    assert STOPPED <= resumed["step"] < STEPS, "it saved the step that it was at"
    assert recipes.events(whole, "gang_lost") == []

    assert [line["step"] for line in recipes.metrics(whole)] == list(range(1, STEPS + 1))
    assert recipes.metrics(killed) == recipes.metrics(whole)
    validated = recipes.metrics(whole, "rl-validation")
    assert [line["step"] for line in validated] == [10, 20]
    assert recipes.metrics(killed, "rl-validation") == validated, "on the scale of the first one, which a resume keeps"
    names = [file.name for file in sorted((whole / "policy").glob("*.safetensors"))]
    assert names
    for name in names:
        assert (killed / "policy" / name).read_bytes() == (whole / "policy" / name).read_bytes()
