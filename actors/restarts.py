"""How often what was lost is started again before it is given up."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from fractions import Fraction


class RestartBudget:
    """At most ``max_restarts`` for each replica, all together, within any ``window_s`` seconds.

    The rule of supervisors everywhere (intensity and period in Erlang/OTP, burst and interval in systemd): a machine
    lost now and then over a long run is expected and costs nothing in the end, while losses that follow each other
    closely have one cause, which another restart does not mend. It is per replica, as a large fleet loses as many at
    once as a node holds. A restart from when the fleet was larger counts by its share of that size: what leavers were
    restarted for does not weigh on those that stay.

    Args:
        max_restarts: Restarts within one window of a fleet of one.
        window_s: Length of the window, seconds; it ends now.
        size: Replicas of the fleet now.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        max_restarts: int,
        window_s: float,
        *,
        size: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._size = size
        self._clock = clock
        self._taken: deque[tuple[float, int]] = deque()
        """When each was taken, and the size of the fleet then."""

    @property
    def num_taken(self) -> int:
        """Restarts within the window."""
        while self._taken and self._clock() - self._taken[0][0] >= self._window_s:
            self._taken.popleft()
        return len(self._taken)

    @property
    def left(self) -> int:
        """Restarts that may still be taken now."""
        if not self.num_taken:
            return self._max_restarts * self._size_now
        counted = sum(Fraction(self._size_now, max(self._size_now, size)) for _, size in self._taken)
        return max(0, math.floor(self._max_restarts * self._size_now - counted))

    @property
    def _size_now(self) -> int:
        return max(1, self._size())

    def take(self) -> bool:
        """Takes one restart where there is one left; says whether there was."""
        if not self.left:
            return False
        self._taken.append((self._clock(), self._size_now))
        return True

    def give_back(self, num_restarts: int) -> None:
        """Uncounts the latest restarts, for losses that no machine was to blame for."""
        for _ in range(min(num_restarts, len(self._taken))):
            self._taken.pop()


class ProgressBudget:
    """At most ``max_restarts`` without progress in between.

    For a gang, which starts again from its last checkpoint: one that came to a newer checkpoint has outlived what it
    was lost to, however long that took. One that is lost at the same step again and again ends.

    Args:
        max_restarts: Restarts from one point.
        progress: How far the work is kept; a number that only grows with it.
    """

    def __init__(self, max_restarts: int, progress: Callable[[], int]) -> None:
        self._max_restarts = max_restarts
        self._progress = progress
        self._reached = progress()
        self._left = max_restarts

    @property
    def left(self) -> int:
        """Restarts that are left from where the work stands now."""
        if (reached := self._progress()) > self._reached:
            self._reached, self._left = reached, self._max_restarts
        return self._left

    def take(self) -> bool:
        """Takes one restart where there is one left; says whether there was."""
        if self.left == 0:
            return False
        self._left -= 1
        return True
