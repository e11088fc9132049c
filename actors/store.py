"""Where rollouts live: the object store in a cluster, the process itself in tests without Ray.

Workers are plain classes that are handed a ``Store``; they never import ray. ``RayStore`` names a long-lived actor as
the owner of what it puts, so that a rollout outlives the generation replica that drew it.
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

    Args:
        owner: Actor that owns what is put; None makes the calling process the owner.
        timeout_s: Longest wait for a value from another node.
    """

    def __init__(self, owner: Any = None, *, timeout_s: float = 300.0) -> None:
        self._owner = owner
        self._timeout_s = timeout_s

    def put(self, value: Any) -> Handle:
        """Stores a value in the object store of this node."""
        import ray

        return ray.put(value, _owner=self._owner)

    def get(self, handle: Handle) -> Any:
        """Fetches a value; raises Ray's ``ObjectLostError`` family where its node is gone."""
        import ray

        return ray.get(handle, timeout=self._timeout_s)
