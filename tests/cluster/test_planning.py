"""What each stage holds at the same time, and that a stage that cannot fit is refused by arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import planning
from cluster.config import RunConfig, roles_of
from cluster.plan.devices import CATALOGUE
from cluster.planning import check_devices, check_placement, print_plan, private_node
from cluster.topology import NodeCapacity
from rlhf.config import load_file, merge, validate
from rlhf.errors import PlacementError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def quickstart(changes: dict[str, Any] | None = None, stages: list[dict[str, Any]] | None = None) -> RunConfig:
    document = merge(load_file(QUICKSTART), changes or {})
    return validate(RunConfig, document | ({"stages": stages} if stages else {}), "test")


def rl(**changes: Any) -> dict[str, Any]:
    loop = {"steps": 1, "prompts_per_step": 4, "num_samples": 2}
    return {"kind": "rl", "rewards": [{"source": "rules", "rules": [{"rule": "repetition"}]}], "loop": loop} | changes


def node(cpus: float, gpus: float = 0.0) -> NodeCapacity:
    return NodeCapacity("a", cpus, gpus)


def test_every_stage_names_all_that_it_places() -> None:
    config = quickstart()
    assert {stage.name: roles_of(config, stage) for stage in config.stages} == {
        "feedback": {"recorder", "generation", "judge", "evaluator"},
        "reward": {"learner"},
        "sft": {"learner"},
        "rl": {"recorder", "generation", "judge", "scorer", "reference", "learner"},
        "evaluate": {"recorder", "generation", "judge", "scorer", "reference", "evaluator"},
    }


@pytest.mark.parametrize(
    ("stage", "roles"),
    [
        ({"kind": "feedback"}, {"recorder", "generation", "judge"}),
        ({"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}, {"recorder"}),
        (rl(), {"recorder", "generation", "rules", "learner"}),
        (
            rl(algorithm={"name": "ppo", "reward_kl": {"coefficient": 0.1}}, critic={}),
            {"recorder", "generation", "rules", "learner", "critic", "reference"},
        ),
        (
            rl(algorithm={"policy": {"kl": {"coefficient": 0.1}}, "name": "rloo"}, learner={"model": {"adapter": {}}}),
            {"recorder", "generation", "rules", "learner"},
        ),
    ],
)
def test_roles_follow_from_what_the_stage_is_told(stage: dict[str, Any], roles: set[str]) -> None:
    config = quickstart(stages=[stage])
    assert roles_of(config, config.stages[0]) == roles


def test_stages_do_not_have_to_fit_beside_each_other() -> None:
    config = quickstart({"roles": {"learner": {"ranks": 3, "resources": {"cpus": 0.5}}}}, stages=[{"kind": "feedback"}])
    alone = check_placement(config, config.stages, [node(0.75)])
    assert alone == {"feedback": 3}
    offline = quickstart(
        {"roles": {"learner": {"ranks": 3, "resources": {"cpus": 0.5}}}},
        stages=[{"kind": "feedback"}, {"kind": "reward"}],
    )
    assert check_placement(offline, offline.stages, [node(1.6)]) == {"feedback": 3, "reward": 4}, "the recorder stays"
    assert check_placement(offline, offline.stages[1:], [node(1.5)]) == {"reward": 3}
    with pytest.raises(PlacementError) as caught:
        check_placement(offline, offline.stages, [node(1.5)])
    assert caught.value.where.startswith("stage reward, role ")


def test_ranks_under_ray_train_count() -> None:
    config = quickstart(
        {"roles": {"learner": {"ranks": 4, "resources": {"gpus": 1}}}},
        stages=[{"kind": "feedback"}, {"kind": "reward"}],
    )
    with pytest.raises(PlacementError) as caught:
        check_placement(config, config.stages, [node(16, 2)])
    assert (caught.value.where, caught.value.exit_code) == ("stage reward, role learner", 3)
    assert "room for 2 of 4 actors" in caught.value.found


def test_the_worker_of_the_rules_and_the_evaluator_count() -> None:
    changes = {"recorder": {"cpus": 1.0}, "roles": {"learner": {"resources": {"cpus": 0.2}}}}
    config = quickstart(changes, stages=[rl()])
    assert check_placement(config, config.stages, [node(2.5)]) == {"rl": 4}, "recorder and rules take 1 CPU each"
    with pytest.raises(PlacementError):
        check_placement(config, config.stages, [node(2.4)])
    config = quickstart({"recorder": {"gpus": 1.0}}, stages=[{"kind": "evaluate"}])
    with pytest.raises(PlacementError) as caught:
        check_placement(config, config.stages, [node(8, 1)])
    assert caught.value.action == "Lower what one actor takes (recorder.cpus, .gpus), or add nodes."


def test_plan_prints_every_role_and_refuses_what_does_not_fit(capsys) -> None:
    assert print_plan(quickstart({"ray": {"num_cpus": 4}})) == 0
    out = capsys.readouterr().out
    assert "evaluator" in out and "recorder" in out
    assert "fits: at most 6 actors at a time on this machine (4 CPUs" in out
    with pytest.raises(PlacementError, match="stage feedback"):
        print_plan(quickstart({"ray": {"num_cpus": 0.2}}))


def test_a_private_cluster_has_the_gpus_that_this_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Path", lambda _: Path("/nowhere"))  # a container may hide the driver's folder
    monkeypatch.setattr(planning, "list_gpus", lambda: ("GPU 0", "GPU 1", "GPU 2"))
    config = quickstart({"ray": {"num_cpus": 4}})
    for visible, found in {None: 3, "0,2": 2, "": 0, "-1": 0, "0,1,2,3": 3}.items():
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        node = private_node(config)
        assert (node.cpus, node.gpus) == (4, found), visible


def gpu_recipe(folder: Path, **learner: Any) -> RunConfig:
    roles = {"learner": {"resources": {"gpus": 1}}, "generation": {"engine": {"max_model_len": 1024}}}
    stage = {"kind": "sft", "data": {"path": "chats.jsonl"}, "learner": learner}
    return quickstart({"model": str(folder), "roles": roles}, stages=[stage])


@pytest.fixture
def seven_billion(tmp_path: Path) -> Path:
    """A folder with the settings of a 7B model and no weights."""
    shape = QUICKSTART.parent / "gpu" / "shapes" / "Qwen2.5-7B-Instruct" / "config.json"
    (tmp_path / "config.json").write_text(shape.read_text())
    return tmp_path


def test_a_run_is_refused_for_what_is_certain_and_warned_of_the_rest(
    seven_billion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.plan.devices.local_device", lambda: CATALOGUE["a100-80gb"])
    monkeypatch.setattr(planning, "_count_gpus", lambda: 1)
    config = gpu_recipe(seven_billion)
    with pytest.raises(PlacementError) as caught:
        check_devices(config, config.stages)
    assert caught.value.where == "stage sft, role learner"
    adapter = {"adapter": {"rank": 16}, "gradient_checkpointing": True}
    greedy = gpu_recipe(seven_billion, model=adapter, max_tokens_per_micro_batch=200_000)
    check_devices(greedy, greedy.stages)
    assert "warning: this may not fit: stage sft, role learner" in capsys.readouterr().err
    modest = gpu_recipe(seven_billion, model=adapter)
    check_devices(modest, modest.stages)
    assert not capsys.readouterr().err


def test_a_model_that_is_not_at_hand_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.plan.devices.local_device", lambda: CATALOGUE["l4-24gb"])
    config = gpu_recipe(Path("nobody-has/seven-billion"))
    check_devices(config, config.stages)


def test_more_host_memory_than_there_is_is_a_warning_on_cpus(
    seven_billion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.plan.devices.host_memory_gib", lambda: 16.0)
    config = quickstart({"model": str(seven_billion)}, stages=[{"kind": "feedback"}, {"kind": "reward"}])
    assert print_plan(config) == 0
    assert "WARNING: more than the 16.0 GiB that it has" in capsys.readouterr().out


def test_a_cluster_that_is_elsewhere_has_to_be_described(
    seven_billion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = gpu_recipe(seven_billion)
    elsewhere = config.model_copy(update={"ray": config.ray.model_copy(update={"address": "10.0.0.1:6379"})})
    assert print_plan(elsewhere) == 0, "nothing is refused for devices that are not known"
    out = capsys.readouterr().out
    assert "describe it with --nodes" in out
    assert "memory of one device, GiB" in out and "GiB of" not in out


def test_a_model_of_another_kind_is_named_and_the_rest_is_planned(
    seven_billion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (seven_billion / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    config = quickstart({"model": str(seven_billion)}, stages=[{"kind": "feedback"}])
    assert print_plan(config) == 0
    assert "memory is not planned" in capsys.readouterr().out


def test_planning_loads_nothing_heavy() -> None:
    recipe = QUICKSTART.parent / "gpu" / "one_node_7b.yaml"
    code = (
        "import sys; from cluster.cli import main; "
        f"main(['plan', {str(recipe)!r}, '--gpus-per-node', '8']); "
        "print(sorted({'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
