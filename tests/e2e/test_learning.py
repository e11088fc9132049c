"""Reinforcement learning learns: from a rule that likes some tokens, the mean reward of a tiny model rises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, FIRST, LAST = 25, 2, 5
WISHES = {"grpo": "[0-9].*[0-9]", "ppo": "[!-/].*[!-/]"}
"""What a completion has to hold twice, by algorithm: a digit, or some of ``!"#$%&'()*+,-./``. Few do at first, and the
policy learns it within ten steps."""


@pytest.mark.timeout(1800)
def test_grpo_and_then_ppo_raise_the_mean_reward(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Two stages of one run; the second has another wish than the first, from whose policy it starts.

    Passes if the last five steps of each earn at least 0.3 more than its first two, a reward being 0 or 1.
    """
    recipes.write_data(tmp_path)
    settings: dict[str, dict[str, Any]] = {
        "grpo": {"algorithm": {"name": "grpo"}},
        "ppo": {
            "algorithm": {"name": "ppo", "num_epochs": 2, "num_mini_batches": 2},
            "critic": recipes.learner(lr=3e-3),
        },
    }
    stages = [
        {
            "kind": "rl",
            "name": name,
            "select_best": False,
            "learner": recipes.learner(lr=3e-3),
            "rewards": [{"source": "rules", "rules": [{"rule": "regex", "pattern": pattern}]}],
            "loop": {"steps": STEPS, "prompts_per_step": 8, "num_samples": 8, "checkpoint_every": STEPS},
            **settings[name],
        }
        for name, pattern in WISHES.items()
    ]
    path = recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, stages))
    assert recipes.run(path) == 0, recipes.log_of(path)
    for stage in WISHES:
        scores = [line["rollout/score"] for line in recipes.metrics(tmp_path / "run", stage)]
        assert len(scores) == STEPS
        print(f"mean reward of {stage} by step:", " ".join(f"{score:.2f}" for score in scores))
        first, last = sum(scores[:FIRST]) / FIRST, sum(scores[-LAST:]) / LAST
        assert last > first + 0.3, stage
