"""Placement: the one place where plain worker classes become Ray actors."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.calls import kill
from actors.health import HEALTH_GROUP
from actors.telemetry import RUN_LABEL
from cluster.keeper import Holding
from cluster.labels import told
from cluster.lease import Kept, Lease
from cluster.token import protect_token
from cluster.topology import NodeCapacity, Resources
from cluster.watchdog import CLUSTER_MARK, Watchdog
from rlhf.errors import ClusterError, PlacementError
from rlhf.runs.memory import RUN_MARK

NETWORK_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA")
"""Which of a node's networks collectives use; workers of a joined cluster get what the driver has set of them."""

KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}
"""Ray's processes rename themselves. Without this the new name's padding goes over the beginning of their environment,
and with it, depending on its place there, the mark by which a run's processes are found."""

START_TRIES = 2
"""Ray gives its node half a minute to start, which a machine that is busy for a moment may need more than once."""

_watchdogs: list[Watchdog] = []
"""Of the private cluster that this process has started."""


def connect(address: str | None, *, num_cpus: float | None, object_store_bytes: int | None) -> None:
    """Joins the cluster at ``address``, or starts a private one on this machine when it is None.

    A private cluster cleans up the children of killed workers (an engine's processes would outlive it otherwise), and a
    watchdog ends it with a driver that is killed. In a cluster that is joined, all workers of this run are told its
    mark, those that Ray Train starts included. Ray's token is made readable by this user alone.

    Raises:
        ClusterError: Ray could not be started, not at the second try either, or not joined; what it had begun is ended.
    """
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.update(KEEP_ENVIRONMENT)
    mark = os.environ.setdefault(RUN_MARK, secrets.token_hex(8))
    options: dict[str, Any] = {"log_to_driver": False, "namespace": "rlhf", "configure_logging": False}
    if address is None:
        options |= {"num_cpus": num_cpus, "object_store_memory": object_store_bytes, "include_dashboard": False}
        options["address"] = "local"  # without it Ray joins whatever cluster runs here or RAY_ADDRESS names
    else:
        networks = {name: os.environ[name] for name in NETWORK_VARIABLES if name in os.environ}
        options |= {"address": address, "runtime_env": {"env_vars": {RUN_MARK: mark} | KEEP_ENVIRONMENT | networks}}
    for tries_left in reversed(range(START_TRIES if address is None else 1)):
        try:
            return _connect_once(address, options)
        except ClusterError as error:
            if not tries_left:
                raise
            print(f"{error.where}: {error.found}; it is started once more", file=sys.stderr, flush=True)


def _connect_once(address: str | None, options: Mapping[str, Any]) -> None:
    if address is None:
        os.environ[CLUSTER_MARK] = secrets.token_hex(8)
        _watchdogs.append(Watchdog(os.environ[CLUSTER_MARK]))
    protect_token()
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises nothing narrower for a head that does not come up
        ray.shutdown()
        while _watchdogs:
            _watchdogs.pop().end_marked()
        os.environ.pop(CLUSTER_MARK, None)
        raise _no_cluster(address, error) from error
    finally:
        protect_token()  # Ray may just have written it


def _no_cluster(address: str | None, error: Exception) -> ClusterError:
    found = f"{type(error).__name__}: {(str(error).strip() or 'no word of why').splitlines()[0]}"
    if address is None:
        return ClusterError(
            "Ray on this machine",
            found=found,
            needed="a private cluster that starts",
            action="Run the same command again: a busy machine is slow to start. If it stays, look for what is short "
            "(`rlhf doctor`; Ray's logs are in session_latest/logs of its temporary folder, /tmp/ray): memory, space "
            "in /dev/shm and /tmp, ports.",
        )
    return ClusterError(
        f"ray.address {address}",
        found=found,
        needed="a Ray cluster that answers there",
        action="Check the address and that the cluster runs (`ray status`) with this environment's versions of Ray and "
        "Python; unset ray.address to start a private cluster here.",
    )


def disconnect() -> None:
    """Leaves the cluster; a private one ends with its processes."""
    ray.shutdown()
    while _watchdogs:
        _watchdogs.pop().dismiss()
    os.environ.pop(CLUSTER_MARK, None)


def cluster_nodes() -> list[NodeCapacity]:
    """What each living node has in all, whoever uses it: Ray has no public call that says what is free on a node."""
    return [
        NodeCapacity(
            node["NodeID"][:8],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            dict(node.get("Labels") or {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_resources() -> NodeCapacity:
    """What all nodes together have free; Ray hears of what others take and give back within seconds."""
    free = ray.available_resources()
    return NodeCapacity("the cluster", free.get("CPU", 0.0), free.get("GPU", 0.0))


def spawn_here(worker: type) -> Any:
    """Creates an actor from a plain class on the driver's node; it only waits for others and takes no resources."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(worker).options(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here)
    return actor.remote()


class Placer:
    """Places the actors of one role: one placement group for the first of them, one more for each that joins later.

    ``reserve`` and ``spawn`` wait for room, so they are called in threads (``Placer.reserved`` does so); several may
    be at it at once. ``close`` ends such waits, and from then on nothing is placed any more.

    Args:
        role: Name in errors.
        resources: Of one actor.
        count: Actors of the first group.
        max_concurrency: Calls that an actor of plain methods runs at a time, in threads; None leaves Ray's default,
            which is one, and many for coroutines.
        restarts: Whether Ray starts an actor again, under its handle and as often as it dies, until somebody ends it
            for good. Its place is given another node where the first one is gone.
        lease: Of a run on a joined cluster, whose actors and groups outlive the driver.
        kept: Actors of an earlier driver; ``spawn`` hands them out before it creates any.
        fingerprint: Of the role's workers, for the next driver.
    """

    def __init__(
        self,
        role: str,
        resources: Resources,
        count: int,
        *,
        max_concurrency: int | None = None,
        restarts: bool = False,
        lease: Lease | None = None,
        kept: Sequence[Kept] = (),
        fingerprint: str = "",
    ) -> None:
        self._role = role
        self._count = count
        self._max_concurrency = max_concurrency
        self._restarts = restarts
        self._resources = resources
        self._bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._groups: list[PlacementGroup] = []
        self._first: PlacementGroup | None = None
        self._free: list[tuple[PlacementGroup, int]] = []
        self._taken: dict[Any, tuple[PlacementGroup, int]] = {}
        self._lease, self._fingerprint = lease, fingerprint
        self._numbers = itertools.count(max((actor.index for actor in kept), default=-1) + 1)
        self._group_names: dict[Any, str] = {}
        self._kept: deque[Any] = deque()
        self._take_over(kept)

    def _take_over(self, kept: Sequence[Kept]) -> None:
        """Fills in the places of actors that are there already; the largest group counts as the first."""
        for actor in kept:
            self._kept.append(actor.handle)
            self._taken[actor.handle] = (actor.group, actor.bundle)
            self._group_names[actor.group.id] = actor.group_name
            if actor.group not in self._groups:
                self._groups.append(actor.group)
        if kept:
            self._first = max(self._groups, key=lambda group: group.bundle_count)
            used = {actor.bundle for actor in kept if actor.group == self._first}
            self._free = [(self._first, i) for i in range(self._first.bundle_count) if i not in used]

    @property
    def kept(self) -> list[Any]:
        """Handles of an earlier driver's actors that were not handed out yet, in the order in which they were made."""
        with self._lock:
            return list(self._kept)

    def refuse(self, handle: Any) -> None:
        """Ends a kept actor that cannot be used after all; another takes its place."""
        with self._lock:
            self._kept.remove(handle)
        kill(handle)
        self.retire(handle)

    @classmethod
    async def reserved(cls, role: str, resources: Resources, count: int, **options: Any) -> Placer:
        """A placer whose first group is reserved; the event loop goes on meanwhile, and a cancelled wait keeps nothing.

        Raises:
            PlacementError: There was no room within the role's ``start_timeout_s``.
        """
        placer = cls(role, resources, count, **options)
        done = False
        try:
            await asyncio.to_thread(placer.reserve)
            done = True
        finally:
            if not done:
                placer.close()
        return placer

    def reserve(self) -> None:
        """Waits for room for the first group; ``PlacementError`` where there is none in time.

        Its places are handed out node by node, so that ranks of one node follow each other.
        """
        if self._count and self._first is None:
            group = self._reserve(self._count)
            with self._lock:
                self._first = group
                self._free = [(group, bundle) for bundle in bundles_by_node(group)]

    def _reserve(self, count: int) -> PlacementGroup:
        options: dict[str, Any] = {} if self._lease is None else self._lease.group_options(self._role)
        if self._resources.labels:
            options["bundle_label_selector"] = [dict(self._resources.labels) for _ in range(count)]
        bundles = [dict(self._bundle) for _ in range(count)]
        group = placement_group(bundles, strategy=self._resources.strategy, **options)
        self._group_names[group.id] = options.get("name", "")
        deadline = time.monotonic() + self._resources.start_timeout_s
        while not self._closed.is_set() and (left := deadline - time.monotonic()) > 0:
            if group.wait(min(left, 1.0)):
                with self._lock:
                    if self._closed.is_set():
                        break  # what the closing itself gave back made the room
                    self._groups.append(group)
                return group
        remove_placement_group(group)
        raise PlacementError(
            f"role {self._role}",
            found=f"no room for {count} x {self._bundle}{self._labels()} in {self._resources.start_timeout_s:.0f} s",
            needed="free nodes",
            action="Free the cluster, lower the role's size, or raise its start_timeout_s.",
        )

    def _labels(self) -> str:
        return f" on nodes labelled {told(self._resources.labels)}" if self._resources.labels else ""

    def spawn(self, worker: type, kwargs: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Any:
        """Creates one actor of the role from a plain class and returns its handle without waiting for its start.

        Actors that were kept come first.

        Raises:
            PlacementError: The actor needs a place of its own and there was no room in time.
        """
        with self._lock:
            if self._kept:
                return self._kept.popleft()
            free = self._free.pop(0) if self._free else None
        slot = free or (self._reserve(1), 0)
        # Where nothing is set Ray sets what an actor reserves; models on another node count its cores themselves.
        threads = self._resources.threads or os.cpu_count() or 1
        mark = {name: os.environ.get(name, "") for name in (RUN_MARK, RUN_LABEL)} | KEEP_ENVIRONMENT
        variables = {"OMP_NUM_THREADS": str(threads)} | mark | dict(env or {})
        actor_class: Any = ray.remote
        options: dict[str, Any] = {} if self._lease is None else self._lease.actor_options(self._role)
        handle: Any = (
            actor_class(concurrency_groups={HEALTH_GROUP: 1})(worker)
            .options(
                num_cpus=self._resources.cpus,
                num_gpus=self._resources.gpus,
                max_restarts=-1 if self._restarts else 0,
                max_task_retries=0,
                max_concurrency=self._max_concurrency,
                scheduling_strategy=PlacementGroupSchedulingStrategy(slot[0], placement_group_bundle_index=slot[1]),
                runtime_env={"env_vars": variables},
                **options,
            )
            .remote(**kwargs)
        )
        with self._lock:
            self._taken[handle] = slot
        if self._lease is not None:
            group = self._group_names[slot[0].id]
            holding = Holding(self._role, next(self._numbers), group, slot[1], self._fingerprint)
            self._lease.register(handle, options["name"], holding)
        return handle

    def retire(self, handle: Any) -> None:
        """Gives the place of an ended actor back: to the next one of the role, or to the cluster if it had joined."""
        with self._lock:
            slot = self._taken.pop(handle, None)
            if slot is None:
                return
            self._forget([handle])
            if slot[0] is self._first:
                self._free.append(slot)
                return
            if slot[0] not in self._groups:
                return  # closed meanwhile
            self._groups.remove(slot[0])
        remove_placement_group(slot[0])

    def close(self) -> None:
        """Removes all placement groups of the role, and with them what still runs or is being created there."""
        self._closed.set()
        with self._lock:
            groups, self._groups = self._groups, []
            if self._restarts:  # the end of its place alone would be one more death to restart it after
                for handle in self._taken:
                    kill(handle)
            self._forget(self._taken)
            self._taken, self._free = {}, []
            self._kept.clear()
        for group in groups:
            remove_placement_group(group)

    def _forget(self, handles: Iterable[Any]) -> None:
        if self._lease is not None:
            for handle in handles:
                self._lease.forget(handle)


def bundles_by_node(group: PlacementGroup) -> list[int]:
    """The bundles of a placed group, those of one node next to each other; nodes in the order of their first bundle."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    first = {node: bundle for bundle, node in sorted(nodes.items(), reverse=True)}
    return sorted(nodes, key=lambda bundle: (first[nodes[bundle]], bundle))
