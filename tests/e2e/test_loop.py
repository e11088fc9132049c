"""A loop of two generation replicas and two ZeRO-2 ranks, from people's rankings; one step is drawn ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.e2e import recipes


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_a_loop_with_two_replicas_and_two_ranks(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
    learner = recipes.learner() | {"deepspeed": {"zero_stage": 2}}
    stages = [
        {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}},
        {"kind": "reward", "learner": learner, "loop": {"groups_per_step": 6}, "held_out_fraction": 0.3},
        {
            "kind": "rl",
            "learner": learner,
            "algorithm": {"name": "grpo", "policy": {"kl": {"coefficient": 0.1}, "importance_cap": 2.0}},
            "rewards": [
                {"source": "reward_model", "normalise": True},
                {"source": "rules", "weight": 0.5, "rules": [{"rule": "repetition", "n": 2}]},
            ],
            "loop": {
                "steps": 3,
                "prompts_per_step": 4,
                "num_samples": 2,
                "evaluate_every": 2,
                "max_staleness": 1,
            },
        },
    ]
    recipe = recipes.base(tmp_path, tiny_model_dir, stages)
    recipe["roles"]["generation"]["replicas"] = 2
    recipe["roles"]["learner"]["ranks"] = 2
    recipe["roles"]["learner"]["resources"]["threads"] = 1
    path = recipes.write_recipe(tmp_path, recipe)
    assert recipes.run(path) == 0, recipes.log_of(path)
    run = tmp_path / "run"

    joined = [(event["role"], event["replica"]) for event in recipes.events(run, "replica_joined")]
    assert {("generation", 0), ("generation", 1)} <= set(joined)
    for stage in ("reward", "rl"):
        shards = {file.name for file in (run / "checkpoints" / stage).rglob("rank_*.safetensors")}
        assert shards == {"rank_0.safetensors", "rank_1.safetensors"}, "each rank wrote its part"
    steps = recipes.metrics(run)
    assert [line["step"] for line in steps] == [1, 2, 3]
    staleness = [line["rollout/staleness"] for line in steps]
    assert all(0 <= value <= 1 for value in staleness) and max(staleness) == 1
    assert {"rollout/score/reward_model", "rollout/score/rules", "learner/kl"} <= steps[-1].keys()
    rollouts = recipes.table(run, "rollouts", "rl.step_*")
    assert len(rollouts) == 3 * 4 * 2 and all(row["status"] == "scored" for row in rollouts)
    assert [line["step"] for line in recipes.metrics(run, "rl-validation")] == [2, 3]
    AutoModelForCausalLM.from_pretrained(run / "policy")

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"] is None and summary["reward_model"]["num_pairs"] > 0
    assert {"start", "reward", "rl"} <= summary["timings"].keys()
    assert len(recipes.events(run, "stage_completed")) == 3
