"""Time and cost: hand-worked operations, and known orders of magnitude."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.settings import LearnerConfig
from cluster.plan.fitting import plan_stage
from cluster.plan.hours import StageHours, stage_hours
from cluster.plan.shape import ModelShape
from cluster.plan.work import forward_operations, questions_of, samples_of, training_operations
from rlhf.models.settings import LoraConfig, ModelConfig
from tests.cluster.plan.recipes import A100, GPU_RECIPES, cluster, recipe, rl, sft, shapes

SMALL = ModelShape(vocabulary=1000, width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=128)
SHARDED = {"model": {"gradient_checkpointing": False}, "deepspeed": {"zero_stage": 3}}


def hours_of(config: Any, target: Any, rows: int | None = None) -> StageHours | None:
    plan = plan_stage(config, 0, shapes(config), target)
    return stage_hours(config, config.stages[0], shapes(config), plan.memories, (A100, rows))


def test_six_operations_a_number_and_token() -> None:
    numbers = SMALL.language_parameters
    attention = 4 * 100 * 2 * 64 * 10
    assert forward_operations(SMALL, 100, 10) == 2 * 100 * numbers + attention
    full = training_operations(SMALL, LearnerConfig(), 100, 10)
    assert full == 6 * 100 * numbers + 3 * attention
    again = training_operations(SMALL, LearnerConfig(model=ModelConfig(gradient_checkpointing=True)), 100, 10)
    assert again == 8 * 100 * numbers + 4 * attention
    adapter = training_operations(SMALL, LearnerConfig(model=ModelConfig(adapter=LoraConfig(rank=1))), 100, 0)
    assert 4 * 100 * numbers < adapter < 4.2 * 100 * numbers
    head = training_operations(SMALL, LearnerConfig(model=ModelConfig(trainable="head")), 100, 0)
    assert 2 * 100 * numbers < head < 4 * 100 * numbers


def test_supervised_7b_is_of_the_order_of_64_a100_hours() -> None:
    """600 million tokens: 200,000 chats of 1,000 tokens in three epochs, the size of an instruction data set."""
    stage = sft(SHARDED, loop={"epochs": 3, "groups_per_step": 128})
    config = recipe(
        stage,
        max_sequence_tokens=2000,
        roles={"learner": {"ranks": 8}, "generation": {"engine": {"max_model_len": 2000}}},
    )
    found = hours_of(config, cluster(gpus=8), rows=200_000)
    assert found is not None
    assert found.trained == 6e8
    assert 64 / 2 < found.gpu_hours < 64 * 2
    assert found.gpu_hours == pytest.approx(6 * 7.6e9 * 6e8 / (0.4 * 312e12) / 3600, rel=0.1)


def test_drawing_is_bound_by_memory_at_small_batches_and_by_products_at_large_ones() -> None:
    def rate(num_seqs: int) -> float:
        config = recipe(
            rl(learner={"model": {"adapter": {}}}), roles={"generation": {"engine": {"max_num_seqs": num_seqs}}}
        )
        found = hours_of(config, cluster(gpus=2))
        assert found is not None
        return found.drawn / found.by_role["generation"] / 3600

    one, many = rate(1), rate(64)
    assert 40 < one < 90, "tokens a second of 15 GB at 60 % of 2 TB/s"
    assert 1500 < many < 64 * one


def test_overlapping_halves_take_as_long_as_the_longer_one() -> None:
    policy = {"name": "grpo", "policy": {"importance_cap": 2.0}}
    loop = {"steps": 10, "prompts_per_step": 16, "num_samples": 4}
    together = hours_of(
        recipe(rl(algorithm=policy, learner={"model": {"adapter": {}}}, loop=loop | {"max_staleness": 1})),
        cluster(gpus=2),
    )
    after = hours_of(recipe(rl(algorithm=policy, learner={"model": {"adapter": {}}}, loop=loop)), cluster(gpus=2))
    assert together is not None and after is not None
    assert after.hours == pytest.approx(sum(after.by_role.values()))
    assert together.hours == pytest.approx(max(together.by_role.values()))
    assert after.gpu_hours == pytest.approx(2 * after.hours)


def test_rows_come_from_the_file_where_it_is_at_hand(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("x" * 399 + "\n" + "y" * 399 + "\n")
    config = recipe(sft(data={"path": str(file)}, loop={"epochs": 2, "groups_per_step": 1}))
    samples = samples_of(config, config.stages[0], rows=7)
    assert samples is not None
    assert (samples.prompts, samples.completion, samples.passes) == (2, 100.0, 2)
    elsewhere = recipe(sft())
    assert samples_of(elsewhere, elsewhere.stages[0], rows=None) is None
    known = samples_of(elsewhere, elsewhere.stages[0], rows=7)
    assert known is not None and (known.prompts, known.completion) == (7, 512.0)


def test_nothing_is_timed_without_gpus() -> None:
    config = recipe(sft(), roles={"learner": {"resources": {"gpus": 0}}})
    assert hours_of(config, replace(cluster(), device=None), rows=100) is None


def test_a_pairwise_judge_is_asked_for_both_orders_of_every_pair() -> None:
    constitutions = GPU_RECIPES.parent / "constitutions"
    for name, questions in (("helpful_pairwise", 20 * 4 * 3), ("film_reviews", 20 * 4), ("nowhere", 20 * 4 * 3)):
        config = recipe(
            {"kind": "feedback", "num_prompts": 20, "loop": {"num_samples": 4}},
            constitutions={"training": str(constitutions / f"{name}.yaml")},
        )
        samples = samples_of(config, config.stages[0], None)
        assert samples is not None
        assert questions_of(config, config.stages[0], samples) == questions, name
