"""What the loss of a gang costs: seconds to notice it and to train again, updates and tokens that are done twice."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.dispatch import Event
    from actors.gang import LearnerGang
    from rlhf.errors import LearnerError


class GangLosses:
    """The losses of the learners of one stage, over all lives of their gangs.

    Args:
        role: Name in events.
        event: Event log.
    """

    def __init__(self, role: str, event: Event) -> None:
        self._role = role
        self._event = event
        self._gangs: list[LearnerGang] = []
        self._tokens: dict[int, float] = {}
        self._lost_at: float | None = None

    def began(self, *gangs: LearnerGang) -> None:
        """A life begins with these gangs."""
        self._gangs = list(gangs)

    def trained(self, num_updates: int, tokens: float) -> None:
        """An update is done; ``tokens`` were trained on."""
        self._tokens[num_updates] = tokens

    def lost(self, error: LearnerError, *, restarts_left: int) -> None:
        """A gang is gone, and so is this life."""
        lost = next((gang for gang in self._gangs if gang.lost_to is not None), None)
        detect_s = 0.0 if lost is None else lost.detect_s
        self._lost_at = time.monotonic() - detect_s
        role = self._role if lost is None else lost.role
        found = {"detect_s": round(detect_s, 3), "restarts_left": restarts_left, "error": str(error)}
        self._event("gang_lost", role=role, **found)

    def resumed(self, num_updates: int) -> None:
        """The next life stands behind ``num_updates`` updates and trains again."""
        again = [done for done in self._tokens if done > num_updates]
        tokens = sum(self._tokens.pop(done) for done in again)
        if self._lost_at is not None:
            cost = {"lost_steps": len(again), "lost_tokens": int(tokens)}
            recover_s = round(time.monotonic() - self._lost_at, 3)
            self._event("gang_restarted", role=self._role, step=num_updates, recover_s=recover_s, **cost)
            self._lost_at = None
