"""Nodes of a real cluster go away without grace: what that costs of restarts, and whom it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.joined import ROOT, JoinedCluster, joined_cluster

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROLES = ("echo", "echo", "learner")


def node(role: str) -> dict[str, Any]:
    return {"num_cpus": 1, "labels": {"for": role}}


def drive(cluster: JoinedCluster, log: Path) -> dict[str, Any]:
    """What the driver tells in the end; a node goes away when it says so."""
    indices = {"echo": 1, "learner": 3}
    command = [sys.executable, "-m", "tests.actors.lost_node_driver", cluster.address]
    with log.open("w") as errors:
        driver = subprocess.Popen(
            command,
            cwd=ROOT,
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert driver.stdin is not None and driver.stdout is not None
    try:
        for line in driver.stdout:
            said = json.loads(line) if line.startswith("{") else {}
            if "told" in said:
                assert driver.wait(60) == 0, log.read_text()[-2000:]
                return dict(said["told"])
            if "lose" in said:
                role = said["lose"]
                cluster.remove(indices[role])
                driver.stdin.write("lost\n")  # it goes on before Ray knows, and before there is another node
                driver.stdin.flush()
                cluster.add(**node(role))
                indices[role] = len(cluster.nodes) - 1
        raise AssertionError(log.read_text()[-4000:])
    finally:
        driver.kill()
        driver.wait(10)


@pytest.mark.timeout(900)
def test_a_lost_node_costs_one_restart_of_what_was_on_it_and_nothing_of_the_others(tmp_path: Path) -> None:
    """The learner's node goes between the put of a bucket and its delivery; that of the next learner between two
    publications; that of a replica in the end, which has one restart.
    """
    with joined_cluster(node("head"), *map(node, ROLES)) as cluster:
        told = drive(cluster, tmp_path / "driver.log")
    kinds = Counter(kind for kind, _ in told["events"])
    assert "OwnerDiedError" in told["cut"] and told["kept"] == [0, 1]
    assert (told["second"], told["third"], told["fourth"]) == ([4, 4], [5, 5], [5, 5])
    assert kinds["replica_lost"] == told["num_taken"] == 1 and len(set(told["answered"])) == 1
    assert not kinds["restart_failed"] and not kinds["restarts_used_up"] and kinds["replica_joined"] == 3
