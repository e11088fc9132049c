"""The starts of replacements that are under way, beside whatever their fleet does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from actors.restarts import RestartBudget
from rlhf.errors import LearnerError, RlhfError

if TYPE_CHECKING:
    from actors.dispatch import Event
    from actors.replicas import FleetLimits


class Replacements:
    """Tasks that start replacements, the restarts that they may take, and the defects that they found.

    An error that ends a task is a defect: another start would have it too. It is an event at once, and kept for the
    next call of the fleet, which ends with it.

    Args:
        role: Name in events.
        limits: Restarts of a fleet.
        event: Event log.
        num_wanted: Replicas that the fleet should have now.
    """

    def __init__(self, role: str, limits: FleetLimits, event: Event, num_wanted: Callable[[], int]) -> None:
        self.budget = RestartBudget(limits.max_restarts, limits.restart_window_s, size=num_wanted)
        self._num_wanted = num_wanted
        self._role = role
        self._limits = limits
        self._event = event
        self._tasks: set[asyncio.Task[None]] = set()
        self._defect: BaseException | None = None
        self._refused: RlhfError | None = None

    @property
    def under_way(self) -> bool:
        """Whether a replacement is being started."""
        return any(not task.done() for task in self._tasks)

    @property
    def may_begin(self) -> bool:
        """Whether it makes sense to start one: nothing was found that all of them would have."""
        self._look()
        return self._defect is None

    def take(self, loss: RlhfError) -> bool:
        """Takes a restart for a loss where there is one left; the first time that a loss gets none is an event."""
        if self.budget.take():
            return True
        if self._refused is not loss:
            self._refused = loss
            limits = {name: getattr(self._limits, name) for name in ("max_restarts", "restart_window_s")}
            self._event("restarts_used_up", role=self._role, replicas=self._num_wanted(), **limits, error=str(loss))
        return False

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts one; the task is kept until it has ended."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._look())
        return task

    def check(self) -> None:
        """Raises the defect that a replacement was found to have."""
        self._look()
        if self._defect is not None:
            raise self._defect

    def note(self, loss: LearnerError) -> None:
        """Keeps the loss of a learner that a newcomer waits for, as a defect is kept."""
        self._look()
        self._defect = self._defect or loss

    def forgive_learner(self) -> None:
        """Forgets a learner that could not give its weights, as another one gives them from now on."""
        self._look()
        if isinstance(self._defect, LearnerError):
            self._defect = None

    async def ended(self) -> None:
        """Returns when none is under way, those that begin meanwhile included; each has deadlines of its own."""
        while running := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(running)

    async def cancel(self) -> None:
        """Ends those that are under way."""
        running = [task for task in self._tasks if not task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _look(self) -> None:
        """Takes ended tasks off the list. A caller may be here before the callback of a task that has just ended."""
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.remove(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._defect = self._defect or error
                self._event("restart_failed", role=self._role, error=str(error))
