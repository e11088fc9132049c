"""From a file of people's rankings to PPO with an adapter and its evaluation, on real engines, without a judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.e2e import recipes


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_people_to_ppo(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    bare = [{"prompt": row["prompt"]} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, bare)), encoding="utf-8")
    adapted = recipes.learner()
    adapted["model"] |= {"adapter": {"rank": 4}}
    stages = [
        {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}},
        {"kind": "reward", "learner": recipes.learner(), "loop": {"epochs": 4, "groups_per_step": 8}},
        {
            "kind": "rl",
            "learner": adapted,
            "critic": recipes.learner(),
            "algorithm": {"name": "ppo", "num_mini_batches": 2, "reward_kl": {"coefficient": 0.05}},
            "rewards": [{"source": "reward_model"}],
            "loop": {"steps": 3, "prompts_per_step": 8, "num_samples": 2, "evaluate_every": 2},
        },
        {"kind": "evaluate", "num_samples": 1, "best_of": 2},
    ]
    document = recipes.base(tmp_path, tiny_model_dir, stages)
    del document["constitutions"]
    recipe = recipes.write_recipe(tmp_path, document)
    assert recipes.run(recipe) == 0, recipes.log_of(recipe)
    run = tmp_path / "run"

    rankings = recipes.table(run, "rankings")
    tied = [row["ranks"] for row in rankings if len(row["ranks"]) == 4]
    assert len(rankings) == 16 and tied == [[1, 2, 2, 3]] * 8

    steps = recipes.metrics(run)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all("critic/value_loss" in line and "learner/kl" in line for line in steps)
    rows = recipes.table(run, "rollouts", "rl.step_*")
    uids = [row["uid"] for row in rows]
    assert len(rows) == 3 * 8 * 2
    assert all(uids.count(uid) == 2 for uid in uids), "every prompt once an epoch, two siblings each"
    assert {span["version"] for row in rows for span in row["version_spans"]} == {0, 1, 2}
    AutoModelForCausalLM.from_pretrained(run / "policy")
    assert (run / "policy" / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForSequenceClassification.from_pretrained(run / "reward_model")

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    measured = {"reward_model", "kl_per_token", "nll_start", "length", "distinct_2"}
    for arm in ("before", "after", "best_of_n"):
        assert measured <= summary["eval"][arm].keys()
        assert not {"follows_request", "judge_margin", "on_topic"} & summary["eval"][arm].keys()
    assert summary["eval"]["num_prompts"] == 16
    assert summary["eval"]["before"]["kl_per_token"]["mean"] == pytest.approx(0.0, abs=1e-4), "in fp32"
    assert summary["eval"]["after"]["kl_per_token"]["mean"] > 0.0
    completions = recipes.table(run, "eval")
    assert len(completions) == 16 and all(row["before"] is not None and row["after"] is not None for row in completions)
    assert (summary["eval"]["win_rate"], summary["eval"]["slices"], summary["eval"]["missing"]) == (None, {}, {})
    told = " ".join(summary["notes"])
    assert all(name in told for name in ("follows_request", "win_rate", "slices", "on_topic"))
    roles = {json.loads(line).get("role") for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()}
    assert "generation" in roles and "judge" not in roles

    before = recipes.log_of(recipe)
    assert recipes.run(recipe, timeout_s=60) == 0
    assert "every stage is complete" in recipes.log_of(recipe).removeprefix(before)
