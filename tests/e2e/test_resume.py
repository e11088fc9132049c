"""A synchronous fp32 run repeats bit for bit, also when its driver is killed or stopped in between."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e import recipes


@pytest.mark.engine
def test_killed_and_resumed_run_has_the_same_bits(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
    stages = [
        {
            "kind": "rl",
            "select_best": False,
            "learner": recipes.learner(),
            "algorithm": {"name": "grpo", "policy": {"kl": {"coefficient": 0.1}}},
            "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
            "loop": {"steps": 5, "prompts_per_step": 4, "num_samples": 2, "checkpoint_every": 2},
        }
    ]
    recipe = recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, stages))
    run = tmp_path / "run"
    assert recipes.run(recipe) == 0, recipes.log_of(recipe)
    whole = recipes.metrics(run)
    assert len(whole) == 5
    shutil.move(run, tmp_path / "whole")

    driver = recipes.start(recipe)
    code = recipes.kill_when(driver, lambda: len(recipes.metrics(run)) >= 3, sign=signal.SIGKILL)
    assert code == -signal.SIGKILL
    recipes.assert_gone(recipe)
    assert not (run / "stages" / "rl.json").exists()
    driver = recipes.start(recipe)
    recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 3)
    recipes.kill_worker(recipe, "ray::LearnerWorker")
    code = recipes.kill_when(driver, lambda: len(recipes.metrics(run)) >= 4, sign=signal.SIGTERM)
    assert "gang_lost" in (run / "events.jsonl").read_text()
    assert code == 128 + signal.SIGTERM, recipes.log_of(recipe)
    recipes.assert_gone(recipe)
    assert recipes.run(recipe) == 0, recipes.log_of(recipe)
    assert recipes.metrics(run) == whole

    names = [file.name for file in sorted((tmp_path / "whole" / "policy").glob("*.safetensors"))]
    assert names
    for name in names:
        assert (run / "policy" / name).read_bytes() == (tmp_path / "whole" / "policy" / name).read_bytes()
