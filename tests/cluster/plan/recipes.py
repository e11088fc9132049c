"""Recipes for the planner's tests: a 7B model by its shape alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.plan.devices import CATALOGUE, Device
from cluster.plan.stage_memory import Shapes, shapes_of
from cluster.plan.target import Target
from cluster.topology import NodeCapacity
from rlhf.config import merge, validate

GPU_RECIPES = Path(__file__).resolve().parents[3] / "configs" / "gpu"
SHAPES = GPU_RECIPES / "shapes"
A100 = CATALOGUE["a100-80gb"]


def sft(learner: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"kind": "sft", "data": {"path": "nowhere.jsonl"}, "learner": learner or {}} | changes


def rl(**changes: Any) -> dict[str, Any]:
    loop = {"steps": 10, "prompts_per_step": 16, "num_samples": 4}
    return {"kind": "rl", "rewards": [{"source": "rules", "rules": [{"rule": "repetition"}]}], "loop": loop} | changes


def recipe(*stages: dict[str, Any], **changes: Any) -> RunConfig:
    document: dict[str, Any] = {
        "name": "x",
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "max_sequence_tokens": 1024,
        "sampling": {"max_tokens": 512},
        "data": {name: {"path": "nowhere.jsonl"} for name in ("train", "validation", "evaluation")},
        "constitutions": {"training": "c.yaml"},
        "gate": "open",
        "roles": {
            "learner": {"resources": {"gpus": 1}},
            "generation": {"resources": {"gpus": 1}, "engine": {"kv_cache_gib": None}},
        },
        "stages": list(stages),
    }
    return validate(RunConfig, merge(document, changes), "test")


def shapes(config: RunConfig) -> Shapes:
    return shapes_of(config, SHAPES)


def cluster(nodes: int = 1, gpus: int = 1, device: Device = A100, host_gib: float | None = None) -> Target:
    return Target(tuple(NodeCapacity(str(i), 64.0, float(gpus)) for i in range(nodes)), device, host_gib)
