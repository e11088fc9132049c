"""Where rollouts live: the object store in a cluster, the process itself in tests without Ray.

Workers are plain classes that are handed a ``Store``; they never import ray. ``RayStore`` hands what it puts to a
long-lived actor, so that a rollout outlives the generation replica that drew it. What that actor owned is gone when it
dies: whoever reads it finds ``ValueLostError``. Whoever puts waits for the actor to be restarted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from rlhf.errors import DeadlineError, RecordError, RlhfError, RolloutsLostError, StoreFullError, ValueLostError
from rlhf.types import GroupHandle, Handle, RolloutGroup, Verdict

T = TypeVar("T")


class Store(Protocol):
    """Puts and gets values that are too large for a message. Both may wait, so an event loop calls them in a thread."""

    def put(self, value: Any) -> Handle:
        """Stores a value and returns its handle."""
        ...

    def get(self, handle: Handle) -> Any:
        """Returns the value; numpy arrays are shared and read-only.

        Raises:
            ValueLostError: It went away with its node.
        """
        ...


class LocalStore:
    """Handles are the values themselves."""

    def put(self, value: Any) -> Handle:
        """Returns the value."""
        return value

    def get(self, handle: Handle) -> Any:
        """Returns the value."""
        return handle


class RayStore:
    """Ray's object store.

    ``ray.put`` always writes to shared memory, however small the value, where a method's return below about 100 KB
    would be inlined and travel through its caller.

    Ray ties an object to the process that put it and has no way to name another owner, so with an owner the value is
    sent there and put by it: one copy more, and the value lives on the owner's node.

    Args:
        owner: Actor with a method ``keep(value)`` that returns a list with the handle, such as the recorder; it owns
            what is put. None makes the calling process the owner.
        timeout_s: Longest wait for the owner's answer, or for a value from another node.
        restart_timeout_s: Longest wait for an owner that is being restarted.
    """

    def __init__(self, owner: Any = None, *, timeout_s: float = 300.0, restart_timeout_s: float = 600.0) -> None:
        self._owner = owner
        self._timeout_s = timeout_s
        self._restart_timeout_s = restart_timeout_s

    @property
    def owner(self) -> Any:
        """Handle of the actor that owns what is put; None for the calling process."""
        return self._owner

    def put(self, value: Any) -> Handle:
        """Stores a value; with an owner, returns when the owner has it, after a restart of the owner where it dies.

        Raises:
            DeadlineError: The owner did not take it in time.
            RecordError: The owner is gone, for every replica and for good.
            StoreFullError: There is no room, neither in memory nor on the disk that the store spills to.
        """
        import ray

        try:
            if self._owner is None:
                return ray.put(value)
            return self._hand_over(value)
        except ray.exceptions.GetTimeoutError:
            self._too_late("put", "the owner's answer")
        except ray.exceptions.ActorDiedError as error:  # of no replica that another one could stand in for
            raise recorder_gone("object store, put", error) from error
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise _no_room(error) from error

    def _hand_over(self, value: Any) -> Handle:
        """Has the owner put a value; one that cannot be reached is asked until Ray has restarted it or given it up."""
        import ray

        away_since: float | None = None
        while True:
            try:
                [handle] = ray.get(self._owner.keep.remote(value), timeout=self._timeout_s)
                return handle
            except ray.exceptions.RayActorError as error:  # what it may have kept already is let go of again
                if not may_come_back(error):
                    raise
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since >= self._restart_timeout_s:
                    raise recorder_gone("object store, put", error) from error
            time.sleep(min(1.0, self._restart_timeout_s / 10))

    def get(self, handle: Handle) -> Any:
        """Fetches a value.

        Raises:
            ValueLostError: Its node is gone, or its owner.
            DeadlineError: It did not come in time.
        """
        import ray

        try:
            return ray.get(handle, timeout=self._timeout_s)
        except ray.exceptions.ObjectLostError as error:
            raise ValueLostError(
                f"object store, {handle}",
                found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                needed="the value that was put",
                action="Look for a node that went away.",
            ) from error
        except ray.exceptions.GetTimeoutError:
            self._too_late("get", "the value")

    def _too_late(self, what: str, needed: str) -> NoReturn:
        raise DeadlineError(
            f"object store, {what}",
            found=f"nothing after {self._timeout_s:.0f} s",
            needed=needed,
            action="Look at the recorder's log and at the network between the nodes.",
        ) from None


def may_come_back(error: BaseException | None) -> bool:
    """Whether a call failed as its actor could not be reached: it may be there again soon, restarted or not."""
    import ray

    # A node that a spot market takes back is told of as a death for good, also of an actor that Ray restarts.
    unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
    return unreachable or (isinstance(error, ray.exceptions.ActorDiedError) and error.preempted)


def recorder_gone(where: str, error: BaseException) -> RecordError:
    """The error for a recorder that is not started again."""
    found = error.found if isinstance(error, RlhfError) else str(error)
    return RecordError(
        where,
        found=f"{type(error).__name__}: {found.strip().splitlines()[0]}",
        needed="the run's recorder, which owns every rollout",
        action="Look in events.jsonl for what it was lost to and why it was not started again: recorder.max_restarts, "
        "recorder.labels. Run the same command again: it starts another recorder and goes on from the last checkpoint.",
    )


def _no_room(error: Exception) -> StoreFullError:
    return StoreFullError(
        "object store, put",
        found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
        needed="room for one more group or bucket, in memory or on the disk that the store spills to",
        action="Raise ray.object_store_gib of the recipe (of a cluster: `ray start --object-store-memory`), free the "
        "disk under Ray's temporary folder, or lower loop.prompts_per_step or roles.generation.bucket_mib.",
    )


def fetch_payload(handle: GroupHandle, store: Store) -> RolloutGroup:
    """Reads one rollout group."""
    group: RolloutGroup = store.get(handle.payload)
    return group


def evidence_of(handle: GroupHandle, store: Store) -> tuple[Verdict, ...]:
    """Reads the verdicts behind a group's scores, each of them once; none where no judge was asked."""
    handles = dict.fromkeys(evidence for score in handle.scores for evidence in score.evidence)
    return tuple(verdict for evidence in handles for verdict in store.get(evidence))


def fetch_all(
    handles: Sequence[GroupHandle], store: Store, read: Callable[[GroupHandle, Store], T], *, where: str
) -> list[T]:
    """Reads groups in order.

    Args:
        handles: What to read.
        store: Where it lives.
        read: How one group is read, for example ``fetch_payload``.
        where: Who reads, for the error.

    Raises:
        RolloutsLostError: Some went away with their node; it names all of them.
    """
    found: list[T] = []
    lost: list[str] = []
    cause = ""
    for handle in handles:
        try:
            found.append(read(handle, store))
        except ValueLostError as error:
            lost.append(handle.uid)
            cause = cause or error.found
    if lost:
        raise RolloutsLostError.of(where, lost, cause)
    return found
