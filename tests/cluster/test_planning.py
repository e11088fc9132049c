"""What each stage holds at the same time, and that a stage that cannot fit is refused by arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import planning
from cluster.config import RunConfig, roles_of
from cluster.planning import check_placement, print_plan, private_node
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
