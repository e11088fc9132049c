"""A Ray cluster of several nodes on this machine, for drivers that join it. It lives in a process of its own.

``python -m tests.joined`` is that process: nodes as JSON in its argument, the first one the head; then one command a
line on its input: ``{"remove": INDEX}`` takes a node away without grace, ``{"add": NODE}`` adds one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.placement import START_TRIES
from cluster.watchdog import CLUSTER_MARK
from rlhf.runs.memory import RUN_MARK

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class JoinedCluster:
    """A running cluster.

    Attributes:
        address: For ``ray.address``.
        nodes: Ids of its nodes, in the order in which they were added; the first is the head.
        environment: What a driver's process has to find in its environment.
    """

    address: str
    nodes: list[str]
    environment: dict[str, str]
    host: subprocess.Popen[str]

    def remove(self, index: int) -> None:
        """Ends all processes of a node at once."""
        self._ask({"remove": index})

    def add(self, **node: Any) -> None:
        """Adds a node: ``num_cpus``, ``labels``."""
        self.nodes.append(self._ask({"add": node}))

    def _ask(self, command: Mapping[str, Any]) -> Any:
        assert self.host.stdin is not None
        self.host.stdin.write(json.dumps(command) + "\n")
        self.host.stdin.flush()
        return _answer(self.host)


def _started(command: Sequence[str], environment: Mapping[str, str]) -> tuple[subprocess.Popen[str], Any]:
    """The cluster's process and its first answer; it is started anew where a busy machine is too slow for Ray."""
    tries_left = START_TRIES
    while True:
        tries_left -= 1
        host = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, text=True
        )
        try:
            return host, _answer(host)
        except AssertionError:  # it has ended, and its nodes with it
            if not tries_left:
                raise


def _answer(host: subprocess.Popen[str]) -> Any:
    assert host.stdout is not None
    for line in host.stdout:
        if line.startswith("{"):
            return json.loads(line)["answer"]
    raise AssertionError(f"the cluster's process ended with {host.wait(10)}")


@contextlib.contextmanager
def joined_cluster(*nodes: Mapping[str, Any]) -> Iterator[JoinedCluster]:
    """A cluster of these nodes (``num_cpus``, ``labels``) for the length of a block, with a token of its own."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_process_group_cleanup_enabled": "1"}
    left_out = (RUN_MARK, CLUSTER_MARK, "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | own
    command = [sys.executable, "-m", "tests.joined", json.dumps(list(nodes))]
    host, found = _started(command, environment)
    try:
        yield JoinedCluster(found["address"], found["nodes"], environment, host)
    finally:
        assert host.stdin is not None
        host.stdin.close()  # it then ends the nodes
        try:
            host.wait(60)
        except subprocess.TimeoutExpired:
            host.kill()
            host.wait(10)


def _serve(nodes: Sequence[Mapping[str, Any]]) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    started = [cluster.add_node(include_dashboard=False, **node) for node in nodes]

    def answer(value: Any) -> None:
        print(json.dumps({"answer": value}), flush=True)

    answer({"address": cluster.address, "nodes": [node.node_id for node in started]})
    for line in sys.stdin:
        command = json.loads(line)
        if "remove" in command:
            cluster.remove_node(started[command["remove"]], allow_graceful=False)
            answer(None)
        else:
            started.append(cluster.add_node(**command["add"]))
            answer(started[-1].node_id)
    cluster.shutdown()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
