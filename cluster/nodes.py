"""Nodes of a Ray cluster that a batch system starts: joining its head, and waiting until all are there.

``python -m cluster.nodes join ADDRESS`` starts Ray on this node, once the head answers, and stays with it.
``python -m cluster.nodes wait N`` returns once the cluster at ``RAY_ADDRESS`` has N living nodes.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence

from rlhf.errors import ClusterError, RlhfError

POLL_S = 2.0


def wait_for_head(address: str, timeout_s: float) -> None:
    """Returns once something listens at ``HOST:PORT``; ``ClusterError`` where nothing does in time."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=min(5.0, timeout_s)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the head at {address}",
                    found=f"no answer in {timeout_s:.0f} s ({error})",
                    needed="a head that listens there",
                    action="Look at the head's output, and whether nodes reach each other on that port.",
                ) from error
        time.sleep(min(POLL_S, timeout_s / 10))


def wait_for_nodes(count: int, timeout_s: float) -> None:
    """Returns once the cluster at ``RAY_ADDRESS``, or on this machine, has that many nodes.

    Raises:
        ClusterError: It has not in time, or there is none.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address != "auto":
        wait_for_head(address, timeout_s)
    _connect(address, deadline)
    try:
        while True:
            alive = sum(bool(node["Alive"]) for node in ray.nodes())
            if alive >= count:
                print(f"{alive} nodes", flush=True)
                return
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the cluster at {address}",
                    found=f"{alive} nodes after {timeout_s:.0f} s",
                    needed=f"{count}",
                    action="Look at the output of `ray start` on the missing ones.",
                )
            time.sleep(POLL_S)
    finally:
        ray.shutdown()


def _connect(address: str, deadline: float) -> None:
    """Joins the cluster; the node on this machine may still be starting."""
    from cluster.placement import connect

    while True:
        try:
            connect(address, num_cpus=None, object_store_bytes=None)
            return
        except ClusterError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def join(address: str, timeout_s: float) -> None:
    """Becomes ``ray start`` for the head at ``address``, once that answers."""
    wait_for_head(address, timeout_s)
    os.execvp("ray", ["ray", "start", f"--address={address}", "--block"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; ``join`` returns only where it could not start Ray."""
    parser = argparse.ArgumentParser(prog="python -m cluster.nodes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    joining = commands.add_parser("join", help="start Ray on this node")
    joining.add_argument("address", help="HOST:PORT of the head")
    waiting = commands.add_parser("wait", help="wait until all nodes are there")
    waiting.add_argument("count", type=int)
    for command in (joining, waiting):
        command.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "join":
            join(asked.address, asked.timeout)
        else:
            wait_for_nodes(asked.count, asked.timeout)
    except RlhfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
