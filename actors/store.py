"""Where rollouts live: the object store in a cluster, the process itself in tests without Ray.

Workers are plain classes that are handed a ``Store``; they never import ray. ``RayStore`` hands what it puts to a
long-lived actor, so that a rollout outlives the generation replica that drew it.
"""

from __future__ import annotations

from typing import Any, Protocol

from rlhf.types import Handle


class Store(Protocol):
    """Puts and gets values that are too large for a message."""

    def put(self, value: Any) -> Handle:
        """Stores a value and returns its handle."""
        ...

    def get(self, handle: Handle) -> Any:
        """Returns the value; numpy arrays are shared and read-only."""
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
        timeout_s: Longest wait for the owner, or for a value from another node.
    """

    def __init__(self, owner: Any = None, *, timeout_s: float = 300.0) -> None:
        self._owner = owner
        self._timeout_s = timeout_s

    def put(self, value: Any) -> Handle:
        """Stores a value; with an owner, returns when the owner has it."""
        import ray

        if self._owner is None:
            return ray.put(value)
        [handle] = ray.get(self._owner.keep.remote(value), timeout=self._timeout_s)
        return handle

    def get(self, handle: Handle) -> Any:
        """Fetches a value; raises Ray's ``ObjectLostError`` family where its node is gone."""
        import ray

        return ray.get(handle, timeout=self._timeout_s)
