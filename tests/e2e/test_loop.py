"""The whole loop on a tiny model: judge, reward model, supervised start, two-replica two-rank GRPO, evaluation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e import recipes


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_whole_loop_with_two_replicas_and_two_ranks(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
    learner = recipes.learner() | {"deepspeed": {"zero_stage": 2}}
    stages = [
        {"kind": "feedback", "loop": {"num_samples": 3, "prompts_per_chunk": 8}, "measure_agreement": True},
        {"kind": "reward", "learner": learner, "loop": {"groups_per_step": 6}, "held_out_fraction": 0.3},
        {
            "kind": "sft",
            "source": "feedback",
            "min_score": -100.0,
            "learner": learner,
            "loop": {"groups_per_step": 8},
        },
        {
            "kind": "rl",
            "learner": learner,
            "algorithm": {"name": "grpo", "policy": {"kl": {"coefficient": 0.1}, "importance_cap": 2.0}},
            "rewards": [{"source": "reward_model", "normalise": True}, {"source": "judge", "weight": 0.5}],
            "loop": {
                "steps": 3,
                "prompts_per_step": 4,
                "num_samples": 2,
                "evaluate_every": 2,
                "max_staleness": 1,
            },
        },
        {"kind": "evaluate", "num_samples": 2, "best_of": 3},
    ]
    recipe = recipes.base(tmp_path, tiny_model_dir, stages)
    recipe["roles"]["generation"]["replicas"] = 2
    recipe["roles"]["learner"]["ranks"] = 2
    recipe["roles"]["learner"]["resources"]["threads"] = 1
    recipe["criteria"] = {}
    path = recipes.write_recipe(tmp_path, recipe)
    assert recipes.run(path) == 0, recipes.log_of(path)
    run = tmp_path / "run"

    summary = json.loads((run / "summary.json").read_text())
    for arm in ("before", "after", "best_of_n"):
        assert {"mean", "low", "high"} <= summary["eval"][arm]["follows_request"].keys()
        assert "kl_per_token" in summary["eval"][arm]
    assert summary["eval"]["num_prompts"] == 16
    assert summary["eval"]["before"]["kl_per_token"]["mean"] == pytest.approx(0.0, abs=1e-4)
    assert summary["eval"]["after"]["kl_per_token"]["mean"] > 0.0
    assert 0.0 <= summary["feedback"]["judge_agreement"]["mean"] <= 1.0
    assert summary["reward_model"]["num_pairs"] > 0
    assert summary["peak_memory_gib"] > 0.5
    assert {"feedback", "reward", "sft", "rl", "evaluate"} <= summary["timings"].keys()
    assert set(summary["passed"]) >= {"win_rate", "peak_memory"}
    completions = pq.read_table(run / "eval" / "completions.parquet").to_pylist()
    assert len(completions) == 16 * 2
    assert all(row["before"] is not None and row["after"] is not None for row in completions)
    _assert_everything_is_kept(run)
    assert {"generation", "judge", "scorer", "learner", "publish"} <= summary["timings"]["rl"].keys()
    assert {"generation", "judge", "scorer", "learner"} <= summary["throughput"].keys()
    staleness = [line["rollout/staleness"] for line in recipes.metrics(run)]
    assert all(0 <= value <= 1 for value in staleness) and max(staleness) == 1
    events = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events.count("stage_completed") == 5


def _assert_everything_is_kept(run: Path) -> None:
    """Every sample with its score, every verdict with its reason, in every stage that draws or judges."""
    rollouts, verdicts = recipes.table(run, "rollouts"), recipes.table(run, "verdicts")
    parts = Counter((row["stage"], row["part"].partition("_")[0]) for row in rollouts)
    assert parts == {("feedback", "chunk"): 16 * 3, ("rl", "step"): 3 * 4 * 2, ("rl", "validation"): 2 * 16}
    assert all(row["score"] is not None for row in rollouts)
    judged = Counter((row["stage"], row["part"].partition("_")[0]) for row in verdicts)
    assert judged == {**parts, ("evaluate", "before"): 16 * 3, ("evaluate", "after"): 16 * 2}
    assert all("log p(" in row["reason"] for row in verdicts)
    samples = pq.read_table(run / "eval" / "evaluate" / "samples.parquet").to_pylist()
    assert Counter(row["arm"] for row in samples) == {"before": 16 * 3, "after": 16 * 2}
    assert all(row["reward_model"] is not None for row in samples)
    best: dict[str, float] = {}
    for row in samples:
        if row["arm"] == "before":
            best[row["uid"]] = max(row["reward_model"], best.get(row["uid"], row["reward_model"]))
    chosen = {row["uid"]: row["reward_model"] for row in samples if row["best_of_n"]}
    assert chosen == best
