"""The driver's side of a run on a joined cluster: its lease on what the run holds there, and what it takes over.

Actors and placement groups of a run are *detached*: they outlive the driver. A keeper (``cluster.keeper``) ends them
when the lease runs out. A new driver of the same run attaches to the keeper, takes over what still fits, and ends the
rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group_table

from cluster.keeper import NAMESPACE, Grant, Holding, Keeper, end_actors, end_named, remove_group
from cluster.topology import NodeCapacity
from rlhf.errors import ClusterError
from rlhf.runs.directory import RunDirectory

ANSWER_S = 120.0
"""What a worker of an earlier driver gets to finish what it is at, give the rest up, and answer."""

CALL_S = 30.0
"""Longest wait for one answer of the keeper."""

ATTACH_S = 180.0
"""Longest wait for a keeper: one that is just ending an earlier driver's actors has to be done first."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An actor of an earlier driver that was taken over, its place, and which of its role's it is."""

    handle: Any
    group: PlacementGroup
    group_name: str
    bundle: int
    index: int


def run_id(run: RunDirectory) -> str:
    """Names a run on a cluster: a digest of where its directory is and of the event that made it.

    The path alone would not do: two users may have runs at the same path, each on a file system of their own.
    """
    with run.events.path.open("rb") as lines:
        created = lines.readline()
    return hashlib.blake2b(str(run.root.resolve()).encode() + b"\0" + created, digest_size=8).hexdigest()


def _exit(error: ClusterError) -> None:
    """Ends this process at once: what it would close belongs to another driver by now, or has been ended."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


class Lease:
    """What a run holds on a joined cluster, renewed by a thread until ``close``.

    Methods block, so a coroutine calls them in a thread; several threads may.

    Args:
        keeper: The keeper's handle.
        prefix: What the names of the run's actors and placement groups begin with.
        grant: What the keeper gave.
        timeout_s: Life of the lease from its last renewal.
        on_lost: Is told that the lease is lost; its call must not return to the work that needed it.
    """

    def __init__(
        self,
        keeper: Any,
        prefix: str,
        grant: Grant,
        *,
        timeout_s: float,
        on_lost: Callable[[ClusterError], None] = _exit,
    ) -> None:
        self.epoch = grant.epoch
        self.silent_s = grant.silent_s
        self._keeper, self._prefix, self._timeout_s, self._on_lost = keeper, prefix, timeout_s, on_lost
        self._inherited = dict(grant.holdings)
        self._own: dict[str, Holding] = {}
        self._names: dict[Any, str] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._renewals = threading.Thread(target=self._renew_until_closed, name="lease-renewal", daemon=True)
        self._renewals.start()

    @classmethod
    def take(cls, run: RunDirectory, timeout_s: float) -> Lease | None:
        """Attaches to the run's keeper, or makes it, and ends what it does not know of.

        Args:
            run: The run directory, locked by this driver.
            timeout_s: How long the run's actors outlive a driver; 0 ends what an earlier one left and takes no lease.

        Raises:
            ClusterError: The keeper did not answer.
        """
        prefix = f"rlhf-{run_id(run)}-"
        if timeout_s == 0:
            end_named(prefix)
            return None
        deadline = time.monotonic() + ATTACH_S
        while time.monotonic() < deadline:
            keeper = _keeper(prefix, timeout_s)
            try:
                grant: Grant | None = ray.get(keeper.attach.remote(timeout_s), timeout=CALL_S)
            except (RayError, GetTimeoutError):  # it has just ended, or is being restarted
                grant = None
            if grant is not None:
                lease = cls(keeper, prefix, grant, timeout_s=timeout_s)
                end_named(prefix, keep=_names(prefix, grant))  # made, and not taken down before the driver was lost
                return lease
            time.sleep(0.5)
        raise ClusterError(
            "the run's keeper",
            found=f"no lease after {ATTACH_S:.0f} s",
            needed="a keeper that answers",
            action=f"Look for the actor {_keeper_name(prefix)!r} (`ray list actors`) and its log; kill it to start "
            "without what earlier drivers left.",
        )

    # Names

    def actor_options(self, role: str) -> dict[str, Any]:
        """Options that make an actor of the role outlive this driver."""
        return {"name": self._name(role), "namespace": NAMESPACE, "lifetime": "detached"}

    def group_options(self, role: str) -> dict[str, Any]:
        """Options that make a placement group of the role outlive this driver."""
        return {"name": self._name(f"{role}-group"), "lifetime": "detached"}

    def _name(self, what: str) -> str:
        return f"{self._prefix}{what}-{self.epoch:x}-{next(self._numbers)}"

    # What this driver holds

    def register(self, handle: Any, name: str, holding: Holding) -> None:
        """Takes down an actor that was just made; the keeper hears of it at once."""
        with self._lock:
            self._own[name] = holding
            self._names[handle] = name
        self._changed.set()

    def forget(self, handle: Any) -> None:
        """Strikes out an actor that was ended."""
        with self._lock:
            name = self._names.pop(handle, None)
            if name is not None:
                self._own.pop(name, None)
        self._changed.set()

    def held(self) -> NodeCapacity:
        """What the run's placement groups hold of the cluster; part of it may be taken over, the rest is given back."""
        groups = [g for g in placement_group_table().values() if g["name"].startswith(self._prefix)]
        bundles = [bundle for g in groups if g["state"] == "CREATED" for bundle in g["bundles"].values()]
        cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU"))
        return NodeCapacity("this run", cpus, gpus)

    # What earlier drivers held

    @property
    def num_inherited(self) -> int:
        """Actors of an earlier driver that nobody has taken over or ended."""
        with self._lock:
            return len(self._inherited)

    def claim(self, role: str, fingerprint: str, count: int, *, whole: bool = False) -> list[Kept]:
        """Takes over a role's actors that fit and answer, and ends the others.

        Those that are taken over have nothing to do: work of the earlier driver was given up (``abandon``, where the
        worker has such a method) or is done.

        Args:
            role: Whose actors.
            fingerprint: What theirs has to be.
            count: How many at most.
            whole: Whether fewer than ``count`` will not do: the ranks of a gang.

        Returns:
            At most ``count`` of them in the order in which they were made; of ``whole``, all or none.
        """
        with self._lock:
            found = {name: item for name, item in self._inherited.items() if item.role == role}
        fitting = sorted((item.index, name) for name, item in found.items() if item.fingerprint == fingerprint)
        kept: dict[str, Kept] = {}
        for name, handle in _answering([name for _, name in fitting]):
            group = _group(found[name].group)
            if group is not None and len(kept) < count:
                kept[name] = Kept(handle, group, found[name].group, found[name].bundle, found[name].index)
        if whole and [actor.index for actor in kept.values()] != list(range(count)):
            kept = {}
        end_actors([name for name in found if name not in kept])
        for group_name in {item.group for item in found.values()} - {found[name].group for name in kept}:
            remove_group(group_name)
        with self._lock:
            for name, item in found.items():
                self._inherited.pop(name, None)
                if name in kept:
                    self._own[name] = item
                    self._names[kept[name].handle] = name
        self._changed.set()
        return list(kept.values())

    def end_unclaimed(self, keep: Collection[str]) -> list[str]:
        """Ends what nobody has taken over of other roles than these; returns the roles that were ended."""
        with self._lock:
            roles = sorted({item.role for item in self._inherited.values()} - set(keep))
        for role in roles:
            self.claim(role, "", 0)
        return roles

    # The lease

    def close(self) -> None:
        """Ends whatever the run still holds, and the keeper: this driver ends in order."""
        self._closed.set()
        self._changed.set()
        self._renewals.join(2 * CALL_S)
        end_named(self._prefix, keep=[_keeper_name(self._prefix)])
        ray.kill(self._keeper, no_restart=True)

    def _renew_until_closed(self) -> None:
        interval_s = min(5.0, self._timeout_s / 10)
        confirmed = time.monotonic()
        while not self._closed.is_set():
            try:
                with self._lock:
                    holdings = self._inherited | self._own
                asked = time.monotonic()
                if not ray.get(self._keeper.renew.remote(self.epoch, holdings), timeout=CALL_S):
                    self._lose("another driver of the same run has followed this one, or its lease had run out")
                    return
                confirmed = asked
            except ActorDiedError:  # one that is being restarted is unavailable instead
                self._end_what_is_left()
                self._lose("a keeper that is gone, as the lease had run out or somebody ended it")
                return
            except (RayError, GetTimeoutError) as error:
                if time.monotonic() - confirmed > self._timeout_s:
                    self._lose(f"no answer of the keeper for {self._timeout_s:g} s ({type(error).__name__})")
                    return
            self._changed.wait(interval_s)
            self._changed.clear()

    def _end_what_is_left(self) -> None:
        """Does the work of a keeper that somebody ended, unless another driver has made a new one."""
        try:
            ray.get_actor(_keeper_name(self._prefix), NAMESPACE)
        except ValueError:
            if not self._closed.is_set():
                end_named(self._prefix)

    def _lose(self, found: str) -> None:
        if not self._closed.is_set():
            self._on_lost(
                ClusterError(
                    "the run's lease on the cluster",
                    found=found,
                    needed="one driver that renews it in time",
                    action="Run the same command again, unless another driver of this run is at work: it goes on from "
                    "the last checkpoint. A driver that may sleep for long needs a longer ray.orphan_timeout_s.",
                )
            )


def _keeper_name(prefix: str) -> str:
    return f"{prefix}keeper"


def _keeper(prefix: str, timeout_s: float) -> Any:
    """The run's keeper, on the cluster's first node, whose loss ends the cluster anyway; it is made where missing."""
    name = _keeper_name(prefix)
    actor: Any = ray.remote(Keeper).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
        max_restarts=-1,
        max_concurrency=4,
    )
    return actor.remote(name, prefix, timeout_s)


def _names(prefix: str, grant: Grant) -> set[str]:
    """The keeper, and what it knows of: actors and placement groups."""
    return {_keeper_name(prefix), *grant.holdings, *(item.group for item in grant.holdings.values())}


def _answering(names: Sequence[str]) -> list[tuple[str, Any]]:
    """Those of the actors that are alive, have given up their work and said so, in the order of the names."""
    handles: dict[str, Any] = {}
    for name in names:
        with contextlib.suppress(ValueError):  # it died with its node, or after its driver
            handles[name] = ray.get_actor(name, NAMESPACE)
    deadline = time.monotonic() + ANSWER_S
    answering: set[str] = set()
    asked = {name: _ask_to_give_up(handle) for name, handle in handles.items()}
    while asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=max(deadline - time.monotonic(), 0.0))
        answers = {name: _succeeded(ref) for name, ref in asked.items()}
        answering |= {name for name, succeeded in answers.items() if succeeded}
        if time.monotonic() >= deadline:
            break
        asked = {name: _ask_to_give_up(handles[name]) for name, succeeded in answers.items() if succeeded is None}
    return [(name, handle) for name, handle in handles.items() if name in answering]


def _ask_to_give_up(handle: Any) -> Any:
    method = handle.abandon if hasattr(handle, "abandon") else handle.__ray_ready__
    return method.remote()


def _succeeded(ref: Any) -> bool | None:
    """None of an actor that Ray is just restarting; it can be asked again."""
    try:
        ray.get(ref, timeout=1.0)
    except ActorUnavailableError:
        return None
    except (RayError, GetTimeoutError):  # it died, is at something else still, or cannot be used any more
        return False
    return True


def _group(name: str) -> PlacementGroup | None:
    try:
        return get_placement_group(name)
    except ValueError:
        return None
