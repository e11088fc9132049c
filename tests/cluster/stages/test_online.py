"""What a reinforcement-learning stage refuses before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import RunConfig
from rlhf.config import validate
from rlhf.errors import ConfigError

RULES = {"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}


def recipe(*, ranks: int = 1, critic_ranks: int = 1, loop: dict[str, Any] | None = None, **stage: Any) -> RunConfig:
    """A recipe of one reinforcement-learning stage with four prompts a step."""
    steps = {"steps": 2, "prompts_per_step": 4, "num_samples": 2, **(loop or {})}
    document = {
        "name": "tiny",
        "model": "model",
        "data": {"train": {"path": "prompts.jsonl"}},
        "roles": {"learner": {"ranks": ranks}, "critic": {"ranks": critic_ranks}},
        "stages": [{"kind": "rl", "rewards": [RULES], "loop": steps, **stage}],
    }
    return validate(RunConfig, document, "recipe.yaml")


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_every_rank_gets_a_prompt_for_every_mini_batch(name: str) -> None:
    algorithm = {"name": name, "num_mini_batches": 2}
    critic = {"critic": {}} if name == "ppo" else {}
    assert recipe(ranks=2, algorithm=algorithm, **critic)
    with pytest.raises(ConfigError, match=r"prompts_per_step of at least roles\.learner\.ranks \(3\)"):
        recipe(ranks=3, algorithm=algorithm, **critic)
    with pytest.raises(
        ConfigError, match=r"at least roles\.learner\.ranks \(1\) times algorithm\.num_mini_batches \(5"
    ):
        recipe(algorithm={"name": name, "num_mini_batches": 5}, **critic)


def test_stale_rollouts_need_their_correction() -> None:
    stale = {"max_staleness": 1}
    with pytest.raises(ConfigError, match=r"max_staleness above 0 needs algorithm\.policy\.importance_cap"):
        recipe(loop=stale)
    assert recipe(loop=stale, algorithm={"name": "grpo", "policy": {"importance_cap": 2.0}})
    assert recipe(loop={"max_staleness": 0})


def test_the_critic_s_ranks_count_too() -> None:
    algorithm = {"name": "ppo", "num_mini_batches": 2}
    with pytest.raises(ConfigError, match=r"at least roles\.critic\.ranks \(3\)"):
        recipe(critic_ranks=3, algorithm=algorithm, critic={})
