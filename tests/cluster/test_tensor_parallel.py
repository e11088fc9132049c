"""Engines over several GPUs: the bundle holds them all, and sizes that cannot work end with exit code 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.roles import Roles
from cluster.tensor_parallel import check_heads
from cluster.topology import NodeCapacity, Resources, assign
from rlhf.config import validate
from rlhf.errors import ConfigError, PlacementError

SIZES = [*range(1, 11), 14, 28]


def roles(role: str, pieces: int, gpus: float, **fields: Any) -> Roles:
    section = {"resources": {"gpus": gpus}, "engine": {"tensor_parallel_size": pieces}, **fields}
    return validate(Roles, {role: section}, "recipe")


@pytest.mark.parametrize("role", ["generation", "judge"])
@pytest.mark.parametrize(
    ("pieces", "gpus", "reserved"),
    [(1, 0, 0), (2, 0, 0), (1, 0.25, 0.25), (1, 1, 1), (2, 2, 2), (8, 8, 8)],
)
def test_a_replica_reserves_a_gpu_for_each_piece(role: str, pieces: int, gpus: float, reserved: float) -> None:
    plan = roles(role, pieces, gpus, replicas=2).plan(role)
    assert (plan.count, plan.gpus) == (2, reserved)


@pytest.mark.parametrize(("pieces", "gpus"), [(2, 1), (1, 2), (2, 0.5), (4, 8)])
def test_pieces_without_gpus_and_gpus_without_pieces_are_refused(pieces: int, gpus: float) -> None:
    with pytest.raises(PlacementError, match=f"tensor_parallel_size {pieces}") as caught:
        roles("generation", pieces, gpus).plan("generation")
    assert caught.value.exit_code == 3
    assert f"resources.gpus={pieces}" in caught.value.action


def test_a_judge_behind_an_endpoint_has_no_engine_to_cut() -> None:
    endpoint = {"base_url": "http://localhost:1/v1", "model": "m"}
    assert roles("judge", 4, 0, endpoint=endpoint).plan("judge").gpus == 0


def test_the_pieces_of_a_replica_share_a_node() -> None:
    plan = roles("generation", 4, 4, replicas=2).plan("generation")
    fits = assign([plan], [NodeCapacity("a", 8, 4), NodeCapacity("b", 8, 8)])
    assert sorted(fits["generation"]) in (["a", "b"], ["b", "b"])
    with pytest.raises(PlacementError, match="4 GPUs on one node"):
        assign([plan], [NodeCapacity("a", 8, 4), NodeCapacity("b", 8, 2), NodeCapacity("c", 8, 2)])


@pytest.mark.parametrize("gpus", [1.5, 2.25])
def test_a_fraction_beside_whole_gpus_is_refused(gpus: float) -> None:
    with pytest.raises(ConfigError, match="whole number of GPUs"):
        validate(Resources, {"gpus": gpus}, "recipe")


@pytest.mark.parametrize(
    ("settings", "fitting"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, [1, 3, 9]),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, [1, 2, 4, 8]),
        ({"num_attention_heads": 28, "num_key_value_heads": 4}, [1, 2, 4, 28]),
        ({"text_config": {"num_attention_heads": 8}}, [1, 2, 4, 8]),
        ({"text_config": {}}, SIZES),
        ({}, SIZES),
    ],
)
def test_the_heads_of_a_model_are_shared_out_evenly(settings: dict[str, Any], fitting: list[int], tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for pieces in SIZES:
        if pieces in fitting:
            check_heads("generation", pieces, tmp_path)
            continue
        with pytest.raises(PlacementError, match=f"{pieces} for a model with") as caught:
            check_heads("generation", pieces, tmp_path)
        assert ", ".join(map(str, fitting)) in caught.value.needed


def test_the_commands_end_with_exit_code_3(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"uid": "a", "prompt": "Say something."}), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model_dir}\nrun_dir: {tmp_path / 'run'}\nmax_sequence_tokens: 64\nsampling: {{max_tokens: 8}}\n"
        "data: {train: {path: p.jsonl}}\nstages:\n- kind: rl\n"
        "  rewards: [{source: rules, rules: [{rule: repetition}]}]\n"
        "  loop: {steps: 1, prompts_per_step: 1, num_samples: 2}\n",
        encoding="utf-8",
    )
    for command, overrides, complaint in [
        ("plan", ["engine.tensor_parallel_size=2", "resources.gpus=1"], "2 GPUs for each replica"),
        ("plan", ["engine.tensor_parallel_size=4096", "resources.gpus=4096"], "4096 GPUs on one node"),
        ("run", ["engine.tensor_parallel_size=7"], "attention heads"),
    ]:
        assert cli.main([command, str(recipe), *(f"roles.generation.{one}" for one in overrides)]) == 3
        assert complaint in capsys.readouterr().err
