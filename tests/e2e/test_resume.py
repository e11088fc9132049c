"""A synchronous fp32 run repeats bit for bit, also when its driver or its learner is killed or stopped in between."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e import recipes

STEPS = 40


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_killed_and_resumed_run_has_the_same_bits(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
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
                "checkpoint_every": 10,
                "evaluate_every": 20,
            },
        }
    ]
    recipe = recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, stages))
    run = tmp_path / "run"
    assert recipes.run(recipe) == 0, recipes.log_of(recipe)
    whole = recipes.metrics(run)
    assert len(whole) == STEPS
    validated = recipes.metrics(run, "rl-validation")
    assert [line["step"] for line in validated] == [20, 40]
    shutil.move(run, tmp_path / "whole")

    def steps_done(count: int) -> bool:
        return len(recipes.metrics(run)) >= count

    driver = recipes.start(recipe)
    code = recipes.kill_when(driver, lambda: steps_done(12), sign=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (run / "stages" / "rl.json").exists()

    driver = recipes.start(recipe)  # goes on behind step 10
    recipes.wait_for(driver, lambda: steps_done(24))
    recipes.kill_worker(recipe, "ray::LearnerWorker")  # the gang starts again behind step 20
    recipes.wait_for(driver, lambda: "gang_lost" in (run / "events.jsonl").read_text())
    code = recipes.kill_when(driver, lambda: steps_done(28), sign=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, recipes.log_of(recipe)

    assert recipes.run(recipe) == 0, recipes.log_of(recipe)
    assert recipes.metrics(run) == whole
    assert recipes.metrics(run, "rl-validation") == validated, "on the scale of the first one, which a resume keeps"
    names = [file.name for file in sorted((tmp_path / "whole" / "policy").glob("*.safetensors"))]
    assert names
    for name in names:
        assert (run / "policy" / name).read_bytes() == (tmp_path / "whole" / "policy" / name).read_bytes()
