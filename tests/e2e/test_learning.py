"""Reinforcement learning learns: from a rule that likes some tokens, the mean reward of a tiny model rises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, FIRST, LAST = 20, 2, 5
WISH = "[0-9].*[0-9]"
"""Two digits somewhere: one completion in seven has them at first, and the policy learns it within ten steps."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"name": "grpo"}},
    "ppo": {
        "algorithm": {"name": "ppo", "num_epochs": 2, "num_mini_batches": 2},
        "critic": recipes.learner(lr=3e-3),
    },
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_mean_reward_rises(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Passes if the last five steps earn at least 0.3 more than the first two; a reward is 0 or 1."""
    recipes.write_data(tmp_path)
    stage = {
        "kind": "rl",
        "select_best": False,
        "learner": recipes.learner(lr=3e-3),
        "rewards": [{"source": "rules", "rules": [{"rule": "regex", "pattern": WISH}]}],
        "loop": {"steps": STEPS, "prompts_per_step": 8, "num_samples": 8, "checkpoint_every": STEPS},
        **ALGORITHMS[name],
    }
    path = recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, [stage]))
    assert recipes.run(path) == 0, recipes.log_of(path)
    scores = [line["rollout/score"] for line in recipes.metrics(tmp_path / "run")]
    assert len(scores) == STEPS
    print(f"mean reward of {name} by step:", " ".join(f"{score:.2f}" for score in scores))
    assert sum(scores[-LAST:]) / LAST > sum(scores[:FIRST]) / FIRST + 0.3
