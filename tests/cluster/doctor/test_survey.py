"""The doctor joins real clusters of two nodes on this machine and asks each of them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.doctor import survey
from cluster.placement import KEEP_ENVIRONMENT
from rlhf.errors import ClusterError
from tests.e2e.recipes import MARKS, ROOT

STARTS = 3

ASK = """
import dataclasses, json, sys
from pathlib import Path
from cluster.doctor.survey import check_cluster
checks = check_cluster(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
print(json.dumps([dataclasses.asdict(check) for check in checks]))
"""


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, without what its own cluster has put there."""
    ours = {name: value for name, value in os.environ.items() if name not in MARKS and not name.startswith("RAY_AUTH")}
    return ours | KEEP_ENVIRONMENT | more


@contextlib.contextmanager
def two_nodes(environment: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A cluster and its address."""
    for _ in range(STARTS):  # Ray gives up on a node whose agents take longer than a busy machine lets them
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.doctor.two_nodes"],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        if address:
            break
        process.communicate(timeout=120)
    assert address, "no cluster could be started"
    try:
        yield process, address
    finally:
        process.stdin.close()
        assert process.wait(120) == 0
        process.stdout.close()


def ask(environment: Mapping[str, str], *arguments: str) -> dict[str, dict[str, Any]]:
    """The findings by name, from a process that joins the cluster and leaves it."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments],
        cwd=ROOT,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.engine
def test_every_node_of_a_cluster_is_asked(tmp_path: Path) -> None:
    """Two nodes with a token and a shared folder; then one of them is taken away."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = clean_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    folder = tmp_path / "runs"
    folder.mkdir()
    with two_nodes(environment) as (process, address):
        found = ask(environment, address, str(folder))
        assert found["nodes"]["found"] == "2 alive"
        for name in ("nodes", "node versions", "other packages", "clocks", "run storage", "file locks"):
            assert found[name]["ok"], found[name]
        assert found["devices"]["found"].count("1 CPUs, ") == 2
        assert not found["object stores"]["ok"], "80 MiB are too few"
        assert not [name for name in found if name.startswith(("node 1", "ray authentication", "ray token"))], found
        assert list(folder.iterdir()) == [], "nothing is left in the run storage"

        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("lose\n")
        process.stdin.flush()
        assert process.stdout.readline() == "lost\n"
        found = ask(environment, address)
        assert not found["nodes"]["ok"] and found["nodes"]["found"].startswith("1 alive, 1 dead")
        assert found["run storage"]["found"] == "not looked at"


@pytest.mark.engine
def test_a_cluster_that_lets_anybody_in_is_an_error() -> None:
    environment = clean_environment(RAY_AUTH_MODE="disabled")
    with two_nodes(environment) as (_, address):
        found = ask(environment, address)
    wrong = [check for check in found.values() if not check["ok"] and check["level"] == "error"]
    kinds = {check["name"].split(" of ")[0] for check in wrong}
    assert kinds == {"bind addresses", "ray authentication"}
    assert all("RAY_AUTH_MODE" in check["action"] for check in wrong)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head", "head:port"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="Name the GCS"):
        survey._check_address(address)


def test_an_address_where_nobody_listens_is_a_finding_at_once() -> None:
    [check] = survey.check_cluster("127.0.0.1:1", None)
    assert (check.name, check.ok, check.level) == ("cluster", False, "error")
    assert "127.0.0.1:1" in check.found and "firewall" in check.action


def test_a_node_without_this_package_can_answer(tmp_path: Path) -> None:
    """What is sent to a node is code, and needs neither this package there nor another version of it to be gone."""
    program = """
import pickle, sys
sys.modules["cluster"] = None
probe = pickle.loads(open(sys.argv[1], "rb").read())()
facts = probe.facts(["ray", "no-such-package"])
print(sorted(facts["versions"]), facts["memory_total"] > 0, probe.clock() > 0)
"""
    import ray

    file = tmp_path / "probe.pickle"
    with survey.sent_as_code():
        file.write_bytes(ray.cloudpickle.dumps(survey.probe.NodeProbe))
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "['python', 'ray'] True True\n", done.stderr
