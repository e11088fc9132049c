"""Whether a folder is on storage that all nodes of a cluster share, found out by writing and reading on each."""

from __future__ import annotations

import contextlib
import secrets
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf.errors import ConfigError

SEEN_WITHIN_S = 10.0
"""How long a file may take from one node to another: network file systems cache folders."""


def check_shared(folder: Path, timeout_s: float = 120.0) -> int:
    """Returns the number of living nodes, all of which read here what this process writes, and the other way round.

    Args:
        folder: The run directory.
        timeout_s: For all nodes together.

    Raises:
        ConfigError: Some node does not; names it.
    """
    word = secrets.token_hex(8)
    probe = folder / f".rlhf-probe-{word}"
    try:
        probe.mkdir()
        (probe / "driver").write_text(word, encoding="utf-8")
    except OSError as error:
        raise _not_shared(folder, f"{error.strerror} at the driver's node") from error
    try:
        return _ask_nodes(folder, probe, word, time.monotonic() + timeout_s)
    finally:
        with contextlib.suppress(OSError):  # left over files harm nobody
            for file in probe.iterdir():
                file.unlink()
            probe.rmdir()


def _ask_nodes(folder: Path, probe: Path, word: str, deadline: float) -> int:
    task: Any = ray.remote(num_cpus=0, max_retries=0)(look)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(probe), word, node
        )
        for node in nodes
    }
    for node, answer in asked.items():
        where = f"node {node[:8]} at {nodes[node]}"
        try:
            fault: str = ray.get(answer, timeout=max(1.0, deadline - time.monotonic()))
        except GetTimeoutError:
            raise _not_shared(folder, f"no answer of {where}") from None
        except RayError as error:
            raise _not_shared(folder, f"{type(error).__name__} of {where}") from error
        if not fault and wait_for_text(probe / node) != word:
            fault = "what it wrote is not seen by the driver"
        if fault:
            raise _not_shared(folder, f"{where}: {fault}")
    return len(nodes)


def look(probe: str, word: str, node: str) -> str:
    """Reads the driver's file on one node and writes an answer beside it; returns what is wrong, or nothing."""
    if wait_for_text(Path(probe) / "driver") != word:
        return "what the driver wrote is not seen there"
    try:
        (Path(probe) / node).write_text(word, encoding="utf-8")
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def wait_for_text(path: Path) -> str:
    """The text of a file as soon as it has one; empty where it has none within ``SEEN_WITHIN_S``."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if text := path.read_text(encoding="utf-8"):
                return text
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.1)


def _not_shared(folder: Path, found: str) -> ConfigError:
    return ConfigError(
        f"run_dir {folder}",
        found=found,
        needed="storage that every node of the cluster reads and writes",
        action="Set run_dir to a folder on such storage (a network file system or a volume that all nodes mount).",
    )
