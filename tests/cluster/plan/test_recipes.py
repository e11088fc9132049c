"""The GPU recipes: each is planned on what its head names, and says that nobody has run it."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from cluster.cli import build_parser, main
from cluster.config import load_run_config
from cluster.plan.fitting import check_memory
from cluster.plan.stage_memory import shapes_of
from cluster.plan.target import options_of
from cluster.planning import check_placement
from rlhf.errors import PlacementError
from tests.cluster.plan.recipes import GPU_RECIPES, SHAPES

RECIPES = sorted(GPU_RECIPES.glob("*.yaml"))


def command_in(path: Path) -> list[str]:
    """The plan's command line in a recipe's head, with the file where it is."""
    [line] = re.findall(r"^# Its plan: rlhf (plan .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(line)
    assert words[1] == f"configs/gpu/{path.name}"
    return [words[0], str(path), *words[2:]]


def options_in(path: Path) -> argparse.Namespace:
    return build_parser().parse_args(command_in(path))


def test_there_is_a_recipe_for_each_size() -> None:
    assert {path.stem for path in RECIPES} == {
        "one_gpu_7b_lora",
        "one_node_7b",
        "one_node_7b_sft",
        "two_nodes_32b",
        "eight_nodes_70b",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_what_its_head_names(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# PLANNED, NOT RUN. ")
    config = load_run_config(path)
    target = options_of(options_in(path)).target
    assert target is not None
    check_placement(config, config.stages, target.nodes)
    shapes = shapes_of(config, SHAPES)
    assert not shapes.missing
    planned = check_memory(config, config.stages, shapes, target)
    assert all(plan.loads for plan in planned if plan.memories), "every model lies on GPUs"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_needs_most_of_what_it_asks_for(path: Path) -> None:
    """Half of the nodes or GPUs, or GPUs of half the size, are refused: the plan is not true of anything."""
    config, options = load_run_config(path), options_in(path)
    options.gpus_per_node = max(1, (options.gpus_per_node or 1) // 2)
    options.gpu, options.gpu_memory_gib = "a100-40gb", None
    target = options_of(options).target
    assert target is not None
    with pytest.raises(PlacementError):
        check_placement(config, config.stages, target.nodes)
        check_memory(config, config.stages, shapes_of(config, SHAPES), target)


def test_the_command_in_the_head_prints_memory_time_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    path = GPU_RECIPES / "one_node_7b_sft.yaml"
    assert main([*command_in(path), "--price-per-gpu-hour", "2"]) == 0
    out = capsys.readouterr().out
    assert "memory of one device, GiB of 79.2" in out
    assert "model Qwen/Qwen2.5-7B-Instruct is not at hand: its shape is read from" in out
    hours, cost = re.findall(r"^sft .* ([\d.]+) +([\d.]+) *$", out, re.MULTILINE)[-1]
    assert 30 < float(hours) < 130, "of the order of 64 A100-hours"
    assert float(cost) == pytest.approx(2 * float(hours), rel=0.01)
    assert "training at 40% of the peak" in out


def test_a_smaller_cluster_is_exit_code_3_and_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(GPU_RECIPES / "one_node_7b_sft.yaml")
    assert main(["plan", path, "--nodes", "1", "roles.learner.ranks=1"]) == 3
    assert "offload_optimizer=true; or " in capsys.readouterr().err
    assert main(["plan", path, "--gpu-memory-gib", "0"]) == 2
