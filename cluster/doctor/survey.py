"""Asks every node of a cluster that is joined: one small actor on each, with a limit on every wait."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import cluster.token
from cluster.doctor import probe
from cluster.doctor.findings import Check, must
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
from cluster.placement import connect, disconnect
from rlhf.errors import ClusterError
from rlhf.runs.environment import PACKAGES

START_LIMIT_S = 60.0
"""For the actors of all nodes together; a node that has to prepare its environment first takes long."""

CALL_LIMIT_S = 15.0
REACH_LIMIT_S = 5.0
STORAGE_LIMIT_S = 10.0
"""Network file systems show what another machine wrote after seconds."""


def check_cluster(address: str, folder: Path | None) -> list[Check]:
    """Joins the cluster, asks its nodes, leaves it.

    Args:
        address: Of its GCS, as ``ray.address`` in a recipe: ``HOST:PORT`` or ``auto``.
        folder: Where run directories are to be, on storage that all nodes share; None does not look.
    """
    try:
        _check_address(address)
        connect(address, num_cpus=None, object_store_bytes=None)
    except ClusterError as error:
        return [must("cluster", False, error.found, error.needed, error.action)]
    try:
        return judge_cluster(folder)
    finally:
        disconnect()


def judge_cluster(folder: Path | None) -> list[Check]:
    """The findings on the cluster that this process has joined."""
    nodes = ray.nodes()
    dead = [_name(node) for node in nodes if not node["Alive"]]
    reports = ask_nodes([node for node in nodes if node["Alive"]], folder)
    here = probe.versions(PACKAGES)
    checks = [*check_nodes(reports, dead), *check_versions(reports, here), check_devices(reports)]
    checks += [
        *check_sizes(reports),
        check_clocks(reports),
        check_storage(reports, None if not folder else str(folder)),
    ]
    if folder is not None:
        checks.append(_check_locks(folder))
    return checks + check_node_access(reports)


def _check_address(address: str) -> None:
    """Whether anybody listens there: Ray itself waits for long."""
    host, _, port = address.rpartition(":")
    needed = "HOST:PORT of a cluster's GCS (`ray start --head` prints it), or auto"
    if address == "auto":
        return
    if "//" in address or not host or not port.isdecimal():
        action = "Name the GCS, not the dashboard: it is on port 6379 unless told otherwise."
        raise ClusterError(f"--address {address}", found=address, needed=needed, action=action)
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_LIMIT_S).close()
    except OSError as error:
        action = "Check the address, that the cluster runs there, and that no firewall is between."
        raise ClusterError(
            f"--address {address}", found=f"{address}: {error.strerror or error}", needed=needed, action=action
        ) from None


def ask_nodes(nodes: Sequence[Mapping[str, Any]], folder: Path | None) -> list[NodeReport]:
    """Places an actor on each node and returns what they say; one that does not answer in time is a report too."""
    actors = {}
    try:
        with sent_as_code():
            actors = {node["NodeID"]: _place(node) for node in nodes}
        asked = {node_id: actor.facts.remote(list(PACKAGES)) for node_id, actor in actors.items()}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=START_LIMIT_S)
        reports = [_report(node, actors[node["NodeID"]], asked[node["NodeID"]]) for node in nodes]
        answered = {_name(node): actors[node["NodeID"]] for node in nodes}
        return _with_storage(reports, answered, folder)
    finally:
        for actor in actors.values():
            ray.kill(actor)


@contextlib.contextmanager
def sent_as_code() -> Iterator[None]:
    """Within the block the probe is sent as code: a node need not have this package, or has another version of it."""
    modules = (probe, cluster.token)
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _place(node: Mapping[str, Any]) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor: Any = ray.remote(probe.NodeProbe).options(num_cpus=0, max_restarts=0, scheduling_strategy=there)
    return actor.remote()


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _report(node: Mapping[str, Any], actor: Any, asked: Any) -> NodeReport:
    """One node's answer, and how far its clock is off by the quickest of three questions."""
    try:
        facts = ray.get(asked, timeout=0.1)
        clock_s, error_s = min((_clock(actor) for _ in range(3)), key=lambda found: found[1])
    except ray.exceptions.GetTimeoutError:
        fault = f"no answer in {START_LIMIT_S:.0f} s"
    except ray.exceptions.RayError as error:
        fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    else:
        return NodeReport(_name(node), node["Resources"], facts, clock_s=clock_s, clock_error_s=error_s)
    return NodeReport(_name(node), node["Resources"], None, fault)


def _clock(actor: Any) -> tuple[float, float]:
    began = time.time()
    there = ray.get(actor.clock.remote(), timeout=CALL_LIMIT_S)
    ended = time.time()
    return there - (began + ended) / 2, (ended - began) / 2


def _with_storage(reports: Sequence[NodeReport], actors: Mapping[str, Any], folder: Path | None) -> list[NodeReport]:
    """Adds what is wrong with the storage: the driver writes a file, each node reads it and writes one of its own."""
    if folder is None:
        return list(reports)
    name = f"{probe.PROBE_FILE}{secrets.token_hex(6)}"
    mine = folder / f"{name}-driver"
    content = secrets.token_hex(32)
    try:
        mine.write_text(content, encoding="utf-8")
    except OSError as error:
        fault = f"the driver cannot write there ({error.strerror})"
        return [dataclasses.replace(report, storage=fault) for report in reports]

    def ask(report: NodeReport) -> NodeReport:
        if report.facts is None:
            return report
        return dataclasses.replace(report, storage=_exchange(actors[report.name], folder, name, content))

    try:
        with ThreadPoolExecutor(max_workers=32) as threads:  # a node that sees nothing is asked for a while
            return list(threads.map(ask, reports))
    finally:
        for file in folder.glob(f"{name}-*"):
            file.unlink(missing_ok=True)


def _exchange(actor: Any, folder: Path, name: str, content: str) -> str:
    own = secrets.token_hex(6)
    arguments = (str(folder), name)
    try:
        deadline = time.monotonic() + STORAGE_LIMIT_S
        while fault := ray.get(actor.exchange.remote(*arguments, content, own), timeout=CALL_LIMIT_S):
            if time.monotonic() > deadline:
                return fault
            time.sleep(0.5)
        answer = folder / f"{name}-{own}"
        while not (answer.is_file() and answer.read_text(encoding="utf-8") == own):
            if time.monotonic() > deadline:
                return "the driver does not see what the node wrote"
            time.sleep(0.5)
        return ""
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    except OSError as error:
        return f"the driver cannot read there ({error.strerror})"
    finally:
        ray.wait([actor.forget.remote(*arguments, own)], timeout=CALL_LIMIT_S)


def _check_locks(folder: Path) -> Check:
    """A run directory is locked by its driver."""
    path = folder / f"{probe.PROBE_FILE}{secrets.token_hex(6)}-lock"
    fault = ""
    try:
        with path.open("w", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        fault = error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)
    action = "Mount it with locks (NFS: version 4, without `nolock`): two drivers must not share a run directory."
    return must("file locks", not fault, fault or f"work in {folder}", "flock", action)
