"""What fits is let pass; what does not is refused with changes that were tried."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.plan.devices import CATALOGUE, GIB, Device
from cluster.plan.fitting import check_memory, plan_stage
from cluster.plan.report import fullest
from rlhf.config import apply_overrides, validate
from rlhf.errors import PlacementError
from tests.cluster.plan.recipes import A100, cluster, recipe, rl, sft, shapes

CHECKPOINTED = {"model": {"gradient_checkpointing": True}}
SHARED: dict[str, Any] = {
    "gate": "shared",
    "roles": {
        "learner": {"resources": {"gpus": 0.5}},
        "generation": {
            "resources": {"gpus": 0.5},
            "engine": {"enable_sleep": True, "kv_cache_gib": 20, "gpu_memory_utilization": 0.6},
        },
    },
}
LORA = {"model": {"adapter": {"rank": 16}, "gradient_checkpointing": True}}


def refusal(config: Any, target: Any) -> PlacementError:
    with pytest.raises(PlacementError) as caught:
        check_memory(config, config.stages, shapes(config), target)
    assert caught.value.exit_code == 3
    return caught.value


def changed(config: Any, action: str) -> list[Any]:
    """The recipes that an error's action names, one for each of its alternatives."""
    found = action.removeprefix("Set ").removesuffix(".")
    return [
        validate(type(config), apply_overrides(config.model_dump(mode="json"), change.split()), "test")
        for change in found.split("; or ")
    ]


def test_a_7b_model_in_full_is_refused_on_one_gpu_of_80_gb_and_told_what_would_do() -> None:
    config = recipe(sft(CHECKPOINTED))
    error = refusal(config, cluster())
    assert error.where == "stage sft, role learner"
    assert "optimizer 85.1" in error.found and "GiB on a device" in error.found
    assert error.needed == "at most 79.2 GiB, what a100-80gb has"
    assert error.action == (
        "Set stages.0.learner.deepspeed.zero_stage=2 stages.0.learner.deepspeed.offload_optimizer=true; "
        "or stages.0.learner.model.adapter.rank=16."
    )
    for other in changed(config, error.action):
        check_memory(other, other.stages, shapes(other), cluster())


def test_offload_is_not_named_where_the_host_has_no_room_for_it() -> None:
    error = refusal(recipe(sft(CHECKPOINTED)), cluster(host_gib=64.0))
    assert error.action == "Set stages.0.learner.model.adapter.rank=16."
    config = recipe(sft(CHECKPOINTED | {"deepspeed": {"zero_stage": 2, "offload_optimizer": True}}))
    error = refusal(config, cluster(host_gib=64.0))
    assert "GiB of host memory on a node" in error.found
    check_memory(config, config.stages, shapes(config), cluster(host_gib=256.0))


def test_more_gpus_of_the_cluster_come_first() -> None:
    error = refusal(recipe(sft(CHECKPOINTED)), cluster(gpus=8))
    assert error.action.startswith("Set roles.learner.ranks=2 stages.0.learner.deepspeed.zero_stage=3; or ")


def test_ranks_that_are_there_are_told_to_share() -> None:
    config = recipe(sft(CHECKPOINTED), roles={"learner": {"ranks": 8}})
    assert "stages.0.learner.deepspeed.zero_stage=2" in refusal(config, cluster(gpus=8)).action.split("; or ")[0]


def test_a_batch_that_is_too_large_is_made_smaller() -> None:
    config = recipe(sft({"max_tokens_per_micro_batch": 131072} | LORA))
    error = refusal(config, cluster())
    assert error.action.startswith("Set stages.0.learner.max_tokens_per_micro_batch=")
    for other in changed(config, error.action):
        check_memory(other, other.stages, shapes(other), cluster())


def test_an_engine_without_room_for_its_weights_is_cut_over_more_gpus() -> None:
    config = recipe(rl(learner=LORA), model="x/Qwen2.5-32B-Instruct", roles={"learner": {"ranks": 4}})
    small = CATALOGUE["a100-40gb"]
    error = refusal(config, cluster(nodes=2, gpus=8, device=small))
    assert error.where == "stage rl, role generation"
    assert "for the KV cache" in error.found
    assert "roles.generation.engine.tensor_parallel_size=2 roles.generation.resources.gpus=2" in error.action


def test_nothing_helps_where_nothing_does() -> None:
    tiny = Device("tiny", 4.0, 1.0, 1.0)
    error = refusal(recipe(sft(CHECKPOINTED)), cluster(device=tiny))
    assert "use a smaller model, more GPUs, or larger ones" in error.action


def test_only_what_is_certain_counts_where_that_is_asked_for() -> None:
    config = recipe(sft({"max_tokens_per_micro_batch": 131072} | LORA))
    check_memory(config, config.stages, shapes(config), cluster(), only_resident=True)
    full = recipe(sft(CHECKPOINTED))
    with pytest.raises(PlacementError):
        check_memory(full, full.stages, shapes(full), cluster(), only_resident=True)


def test_roles_that_take_turns_need_the_largest_phase_and_the_host_holds_the_rest() -> None:
    config = recipe(rl(learner=LORA), **SHARED)
    plan = plan_stage(config, 0, shapes(config), cluster())
    totals = {load.phase: load.total / GIB for load in plan.loads if load.is_shown}
    assert totals.keys() == {"generation", "learner", "publish"}
    weights = 2 * 7_615_616_512 / GIB
    assert weights + 20 < totals["generation"] < weights + 20 + 4, "its weights and cache, and no learner"
    assert 2 * weights < totals["publish"] < 2 * weights + 6, "both weights, no cache"
    assert max(totals.values()) < sum(totals.values())
    [shown] = fullest(plan.loads)
    assert shown.total / GIB == max(totals.values())
    assert sum(plan.host.values()) / GIB == pytest.approx(2 * weights, rel=0.05)


def test_an_engine_that_starts_beside_others_wants_its_share_free() -> None:
    config = recipe(rl(learner=LORA), **SHARED)
    check_memory(config, config.stages, shapes(config), cluster())
    share = ["roles.generation.engine.gpu_memory_utilization=0.999"]
    greedy = validate(type(config), apply_overrides(config.model_dump(mode="json"), share), "test")
    assert "start of generation" in refusal(greedy, cluster()).where


def test_fractions_that_nobody_moves_add_up() -> None:
    roles = {name: {"resources": {"gpus": 0.5}} for name in ("learner", "generation")}
    roles["generation"]["engine"] = {"kv_cache_gib": 4, "gpu_memory_utilization": 0.4}
    config = recipe(rl(learner=LORA), gate="exclusive", roles=roles)
    plan = plan_stage(config, 0, shapes(config), cluster())
    [load] = [load for load in plan.loads if load.is_shown]
    assert load.total > 2 * 2 * 7_615_616_512 + 4 * GIB


def test_roles_without_gpus_are_never_refused() -> None:
    config = recipe(sft(), roles={"learner": {"resources": {"gpus": 0}}})
    [plan] = check_memory(config, config.stages, shapes(config), cluster(host_gib=8.0))
    assert not plan.loads
    assert sum(plan.host.values()) / GIB > 100
    assert A100.memory_gib < 100
