"""A real run is watched: by ``rlhf status`` and at the endpoint that it names, until its driver is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS = 10**5
SERIES = (
    "ray_rlhf_steps_total",
    "ray_rlhf_score_mean",
    "ray_rlhf_weight_version",
    "ray_rlhf_tokens_total",
    "ray_rlhf_phase_seconds_total",
    "ray_rlhf_publication_bytes",
    "ray_rlhf_engine_requests",
    "ray_rlhf_engine_kv_cache_ratio",
)


def write_recipe(folder: Path, model: Path) -> Path:
    recipes.write_data(folder)
    stage = {
        "kind": "rl",
        "select_best": False,
        "learner": recipes.learner(),
        "algorithm": {"name": "grpo"},
        "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
        "loop": {"steps": STEPS, "prompts_per_step": 4, "num_samples": 2},
    }
    return recipes.write_recipe(folder, recipes.base(folder, model, [stage]))


def status(run: Path) -> tuple[int, dict[str, Any]]:
    """What ``rlhf status --json`` says, and its exit code."""
    command = [sys.executable, "-m", "cluster.cli", "status", str(run), "--json"]
    done = subprocess.run(command, cwd=recipes.ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, json.loads(done.stdout)


def scraped(endpoint: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{endpoint}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.timeout(900)
def test_a_run_can_be_watched_until_it_is_killed(tmp_path: Path, tiny_model_dir: Path) -> None:
    path = write_recipe(tmp_path, tiny_model_dir)
    run = tmp_path / "run"
    with recipes.running(path) as driver:
        recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 3)
        recipes.wait_for(driver, lambda: json.loads((run / "status.json").read_text())["step"] is not None)
        code, document = status(run)
        assert (code, document["health"], document["held"]) == (0, "running", True)
        told = document["status"]
        assert (told["stage"]["name"], told["stage"]["total"]) == ("rl", STEPS)
        assert told["stage"]["done"] >= 2 and told["stage"]["seconds_left"] > 0
        roles = {role["role"]: role for role in told["roles"]}
        assert roles["generation"]["replicas"] == {"healthy": 1}
        assert roles["generation"]["version"] >= 1 and roles["generation"]["tokens_per_second"] > 0
        assert (roles["learner"]["kind"], roles["learner"]["wanted"]) == ("gang", 1)
        assert told["step"]["metrics"]["rollout/staleness"] == 0
        assert told["memory"]["driver_machine"] > 0

        recipes.wait_for(driver, lambda: bool(json.loads((run / "status.json").read_text())["metrics_endpoints"]))
        [target] = json.loads((run / "prometheus.json").read_text(encoding="utf-8"))
        [endpoint] = target["targets"]
        deadline = time.monotonic() + 180
        while lacking := [name for name in SERIES if f"{name}{{" not in scraped(endpoint)]:
            assert time.monotonic() < deadline, lacking
            time.sleep(1.0)
        assert 'run="run"' in next(line for line in scraped(endpoint).splitlines() if line.startswith(SERIES[-1]))

        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(60)
    code, document = status(run)
    assert (code, document["health"], document["held"]) == (1, "lost", False)
    recipes.assert_gone(path)
