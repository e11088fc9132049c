"""Stateless roles are scaled up and down while a run goes on, by the command that a user has for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.actors.judge_service import Service
from tests.drills.times import event_after
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROLES = {"generation": "ray::GenerationWorker", "judge": "ray::OpenAIJudgeWorker", "scorer": "ray::ScorerWorker"}
"""The roles, and how the titles of their workers begin."""
PROMPTS, SAMPLES, ENOUGH_STEPS = 4, 2, 10**5


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def write_recipe(folder: Path, model: Path, service: Service) -> Path:
    recipes.write_data(folder)
    stages = [
        {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}},
        {"kind": "reward", "learner": recipes.learner(), "loop": {"groups_per_step": 8}},
        {
            "kind": "rl",
            "select_best": False,
            "learner": recipes.learner(),
            "algorithm": {"name": "grpo"},
            "rewards": [{"source": "reward_model"}, {"source": "judge"}],
            "loop": {"steps": ENOUGH_STEPS, "prompts_per_step": PROMPTS, "num_samples": SAMPLES},
        },
    ]
    recipe = recipes.base(folder, model, stages)
    recipe["roles"]["judge"]["endpoint"] = {"base_url": service.url, "model": "m", "api_key_variable": None}
    return recipes.write_recipe(folder, recipe)


def scale(run: Path, replicas: int) -> float:
    """Runs ``rlhf scale`` for all three roles and returns when it was asked."""
    asked = time.time()
    wanted = [f"{role}={replicas}" for role in ROLES]
    subprocess.run([sys.executable, "-m", "cluster.cli", "scale", str(run), *wanted], cwd=recipes.ROOT, check=True)
    return asked


def engine_seconds(recipe: Path) -> dict[int, float]:
    """CPU time of each engine so far, by process id; it grows while one draws, and hardly while it waits."""
    found = {pid: psutil.Process(pid).cpu_times() for pid in recipes.workers(recipe, "VLLM::")}
    return {pid: times.user + times.system for pid, times in found.items()}


@pytest.mark.timeout(1800)
def test_replicas_join_and_leave_while_a_run_goes_on(
    tmp_path: Path, tiny_model_dir: Path, service: Service, tell: Callable[..., None]
) -> None:
    """One replica of each role, then two, then one again.

    Passes if steps are made with two replicas and with one after them, the second generation replica has drawn, what
    left is gone, nothing was lost, and every step learned from each of its prompts once, drawn with that step's weights
    and scored by both.
    """
    path = write_recipe(tmp_path, tiny_model_dir, service)
    run = tmp_path / "run"

    def logged() -> int:
        return len(recipes.metrics(run))

    def changed(kind: str, number: int) -> Callable[[], bool]:
        """Whether so many events of a kind have been written for each role."""
        return lambda: all(Counter(e["role"] for e in recipes.events(run, kind))[role] >= number for role in ROLES)

    with recipes.running(path) as driver:
        recipes.wait_for(driver, lambda: logged() >= 2)
        asked = scale(run, 2)
        recipes.wait_for(driver, changed("replica_joined", 2))
        grown = logged()
        before = engine_seconds(path)
        recipes.wait_for(driver, lambda: logged() >= grown + 5)
        assert all(len(recipes.workers(path, title)) == 2 for title in ROLES.values())
        after = engine_seconds(path)
        assert len(before) == 2 and all(after[pid] > used + 0.05 for pid, used in before.items())
        told = scale(run, 1)
        recipes.wait_for(driver, changed("replica_left", 1))
        shrunk = logged()
        recipes.wait_for(driver, lambda: logged() >= shrunk + 3)
        assert all(len(recipes.workers(path, title)) == 1 for title in ROLES.values())
        os.kill(driver.pid, signal.SIGTERM)
        assert driver.wait(300) == 128 + signal.SIGTERM, recipes.log_of(path)
    recipes.assert_gone(path)

    tell("one replica of each role more", recover_s=event_after(run, "replica_joined", asked) - asked)
    tell("and one less", recover_s=event_after(run, "replica_left", told) - told)
    for kind in ("replica_lost", "gang_lost", "redispatched", "scaling_failed"):
        assert recipes.events(run, kind) == []
    _check_rollouts(run, logged())


def _check_rollouts(run: Path, num_steps: int) -> None:
    rows = [row for row in recipes.table(run, "rollouts", "rl.step_*") if row["step"] < num_steps]
    drawn = Counter((row["step"], row["uid"], row["sample"]) for row in rows)
    assert len(rows) == len(drawn) == num_steps * PROMPTS * SAMPLES
    for row in rows:
        assert {span["version"] for span in row["version_spans"]} == {row["step"]}
        assert {"reward_model", "judge"} <= row["components"].keys() and row["score"] is not None
