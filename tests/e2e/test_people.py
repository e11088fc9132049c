"""From a file of people's preferences to PPO, on real engines: the judge is left out."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.e2e import recipes


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_people_to_ppo(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
    stages = [
        {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}},
        {"kind": "reward", "learner": recipes.learner(), "loop": {"epochs": 4, "groups_per_step": 8}},
        {
            "kind": "rl",
            "learner": recipes.learner(),
            "critic": recipes.learner(),
            "algorithm": {"name": "ppo", "num_mini_batches": 2, "reward_kl": {"coefficient": 0.05}},
            "rewards": [{"source": "reward_model"}],
            "loop": {"steps": 3, "prompts_per_step": 8, "num_samples": 2, "evaluate_every": 2},
        },
    ]
    recipe = recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, stages))
    assert recipes.run(recipe) == 0, recipes.log_of(recipe)
    run = tmp_path / "run"

    steps = recipes.metrics(run)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all("critic/value_loss" in line and "learner/kl" in line for line in steps)
    rows = [
        row for file in sorted((run / "rollouts").glob("step_*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    uids = [row["uid"] for row in rows]
    assert len(rows) == 3 * 8 * 2
    assert all(uids.count(uid) == 2 for uid in uids), "every prompt once an epoch, two siblings each"
    assert {span["version"] for row in rows for span in row["version_spans"]} == {0, 1, 2}
    AutoModelForCausalLM.from_pretrained(run / "policy")
    AutoModelForSequenceClassification.from_pretrained(run / "reward_model")

    before = recipes.log_of(recipe)
    assert recipes.run(recipe, timeout_s=60) == 0
    assert "every stage is complete" in recipes.log_of(recipe).removeprefix(before)
