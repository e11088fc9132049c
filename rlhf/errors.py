"""Errors typed by the boundary that was crossed.

Every error says where it happened, what was found, what was needed and what to do. All of them survive pickling, so a
worker process can raise one and the driver sees the same type. The exit code of the command line hangs on the type.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar


class RlhfError(Exception):
    """Base of every error raised on purpose.

    Args:
        where: File and line, config key, role and replica, or stage.
        found: What was there.
        needed: What had to be there.
        action: What the reader can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, *, found: str, needed: str, action: str) -> None:
        super().__init__(where, found, needed, action)
        self.where = where
        self.found = found
        self.needed = needed
        self.action = action

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; needed {self.needed}. {self.action}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.where, self.found, self.needed, self.action)


def _rebuild(kind: type[RlhfError], where: str, found: str, needed: str, action: str) -> RlhfError:
    return kind(where, found=found, needed=needed, action=action)


class ConfigError(RlhfError):
    """A configuration key or a combination of keys cannot be used; raised before any model loads."""

    exit_code = 2


class DataError(RlhfError):
    """A data file cannot be used; ``where`` names file and line."""

    exit_code = 2


class PlacementError(RlhfError):
    """The cluster has fewer devices than the roles need; raised from arithmetic, before anything is placed."""

    exit_code = 3


class ClusterError(RlhfError):
    """A Ray cluster could not be started or joined; nothing was placed."""

    exit_code = 3


class ReplicaLostError(RlhfError):
    """An actor died, hung or its node went away; what it had not returned is dispatched again."""


class WorkerError(RlhfError):
    """A worker's own code has a defect: another replica would have it too, so the run ends. ``where`` names which."""


class EngineError(RlhfError):
    """A generation engine failed or died; its unfinished prompts are dispatched again by uid."""


class ValueLostError(RlhfError):
    """What a handle stands for went away with the node that held it, or with the process that owned it."""


class StoreFullError(RlhfError):
    """The object store of a node, and the disk that it spills to, have no room; another replica has no more of it."""


class RolloutsLostError(RlhfError):
    """Rollout groups went away with their node or their owner; their prompts are dispatched again by uid.

    Args:
        where: Who tried to read them.
        found: As in ``RlhfError``; so are the next two.
        needed: See there.
        action: See there.
        uids: Prompts of the lost groups.
    """

    def __init__(self, where: str, *, found: str, needed: str, action: str, uids: Iterable[str] = ()) -> None:
        super().__init__(where, found=found, needed=needed, action=action)
        self.uids = tuple(uids)

    @classmethod
    def of(cls, where: str, uids: Sequence[str], cause: str) -> RolloutsLostError:
        """The error for at least one lost group; ``cause`` is what reading the first of them gave."""
        more = f" and {len(uids) - 1} more" if len(uids) > 1 else ""
        return cls(
            where,
            found=f"no rollouts of {uids[0]!r}{more} ({cause})",
            needed="every group that was drawn",
            action="They are drawn again; lost again and again, they end the stage. Look for what goes away.",
            uids=uids,
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_lost, (self.where, self.found, self.needed, self.action, self.uids)


def _rebuild_lost(where: str, found: str, needed: str, action: str, uids: tuple[str, ...]) -> RolloutsLostError:
    return RolloutsLostError(where, found=found, needed=needed, action=action, uids=uids)


class JudgeError(RlhfError):
    """A judge refused, failed or answered outside its labels; the verdict is missing, never a number."""


class ScorerError(RlhfError):
    """A reward source failed; the score is missing, never a number."""


class LearnerError(RlhfError):
    """A learner rank failed; its gang restarts from the last verified checkpoint."""


class PublicationError(RlhfError):
    """Weights did not arrive whole (timeout, digest or shape); the replica does not serve until they do."""


class CheckpointError(RlhfError):
    """A checkpoint is incomplete or altered and no older good one could take its place."""


class RecordError(RlhfError):
    """A record of the run (samples, verdicts, metrics) could not be written or read back."""


class NonFiniteError(RlhfError):
    """Loss or gradient was not finite in three updates in a row; every one of them left the weights unchanged."""


class MissingFeedbackError(RlhfError):
    """More verdicts or scores are missing than the configured fraction allows."""


class DeadlineError(RlhfError):
    """A wait came to its timeout."""
