"""A cluster that cannot be had: a typed error that says what to do, and nothing left behind. Ray itself is replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from cluster import cli, placement
from cluster.watchdog import CLUSTER_MARK
from rlhf.errors import ClusterError


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The module without Ray, without this session's own cluster, and with an environment of its own."""
    monkeypatch.setattr(placement, "_watchdogs", [])
    monkeypatch.setattr(placement, "protect_token", lambda: None)
    monkeypatch.setattr(placement.ray, "shutdown", lambda: None)
    monkeypatch.setattr(placement.os, "environ", dict(os.environ))
    return monkeypatch


def test_a_private_cluster_that_does_not_come_up_is_typed_and_leaves_no_process(replaced: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def half_start(**_: Any) -> None:
        mark = {CLUSTER_MARK: placement.os.environ[CLUSTER_MARK]}
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], env=mark))
        raise Exception("The current node timed out during startup.\nMore of it.")  # as bare as Ray's own

    replaced.setattr(placement.ray, "init", half_start)
    with pytest.raises(ClusterError) as caught:
        placement.connect(None, num_cpus=1, object_store_bytes=None)
    assert len(started) == 2, "it is tried twice"
    assert caught.value.exit_code == 3
    assert caught.value.found == "Exception: The current node timed out during startup."
    assert "Run the same command again" in caught.value.action and "rlhf doctor" in caught.value.action
    assert all(process.wait(30) != 0 for process in started), "what Ray had started by then is ended"
    assert placement._watchdogs == [] and CLUSTER_MARK not in placement.os.environ


def test_a_private_cluster_may_come_up_at_the_second_try(replaced: pytest.MonkeyPatch, capsys) -> None:
    marks: list[str] = []

    def start(**_: Any) -> None:
        marks.append(placement.os.environ[CLUSTER_MARK])
        if len(marks) == 1:
            raise Exception("The current node timed out during startup.")

    replaced.setattr(placement.ray, "init", start)
    placement.connect(None, num_cpus=1, object_store_bytes=None)
    assert len(set(marks)) == 2 and len(placement._watchdogs) == 1, "the first one's watchdog went with it"
    assert "it is started once more" in capsys.readouterr().err
    placement.disconnect()


def test_a_cluster_that_does_not_answer_is_named(replaced: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    replaced.setattr(placement.ray, "init", refuse)
    with pytest.raises(ClusterError, match=r"ray.address 10.0.0.1:6379: found ConnectionError") as caught:
        placement.connect("10.0.0.1:6379", num_cpus=None, object_store_bytes=None)
    assert "ray status" in caught.value.action


def test_the_command_ends_with_3_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(_: Any) -> int:
        raise placement._no_cluster(None, TimeoutError())

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["plan", "recipe.yaml"]) == 3
    assert capsys.readouterr().err.startswith("ClusterError: Ray on this machine: found TimeoutError: no word of why")
