"""The stall watchdog: where everybody stands, written down once when a run makes no progress."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from actors.calls import await_ref
from actors.dispatch import Event
from actors.health import HEALTH_GROUP, format_stacks
from rlhf.errors import RecordError, RlhfError
from rlhf.runs.files import write_text

STACKS_TIMEOUT_S = 15.0
"""Longest wait for one worker's stacks: they come from a thread of their own, or not at all."""


class StallWatch:
    """Writes the Python stacks of the driver and of every worker to ``RUN/stacks`` when nothing gets on.

    It ends nothing itself: probes and the calls' own timeouts do, after the stacks are on disk.

    Args:
        run: The run directory.
        event: Event log.
        timeout_s: How long a run may go without any progress.
        actors: The workers to ask, by name.
        progress: Something that changes with any progress of the run.
    """

    def __init__(
        self,
        run: Path,
        event: Event,
        timeout_s: float,
        *,
        actors: Callable[[], Mapping[str, Any]],
        progress: Callable[[], object],
    ) -> None:
        self._run = run
        self._event = event
        self._timeout_s = timeout_s
        self._actors = actors
        self._progress = progress
        self._mark: object = None
        self._since = time.monotonic()
        self._writing = asyncio.Lock()
        self._told = False

    async def run(self) -> None:
        """Watches until it is cancelled."""
        while True:
            await asyncio.sleep(min(5.0, self._timeout_s / 4))
            self._look()
            stalled_s = time.monotonic() - self._since
            if stalled_s >= self._timeout_s:
                await self.stalled("the run", stalled_s)

    async def stalled(self, who: str, seconds: float) -> None:
        """Writes everybody's stacks and an event, once per stall.

        Args:
            who: Makes no progress, such as ``"generation[0]"``.
            seconds: For how long.
        """
        async with self._writing:  # several workers may stall together; each is ended only when the stacks are written
            self._look()
            if self._told:
                return
            text = await self._stacks()
            path = self._run / "stacks" / (time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + ".txt")
            with contextlib.suppress(RecordError):  # a full disk; what stands still is to be ended nevertheless
                await asyncio.to_thread(write_text, path, text)
                self._event("stalled", who=who, seconds=round(seconds, 3), stacks=str(path.relative_to(self._run)))
            self._look()  # the event is no progress
            self._told = True

    def _look(self) -> None:
        if (mark := self._progress()) != self._mark:
            self._mark, self._since, self._told = mark, time.monotonic(), False

    async def _stacks(self) -> str:
        actors = dict(self._actors())
        found = await asyncio.gather(*(self._stacks_of(name, actor) for name, actor in actors.items()))
        driver = format_stacks([asyncio.get_running_loop()])
        return "\n\n".join(
            f"=== {name}\n{text}" for name, text in [("driver", driver), *zip(actors, found, strict=True)]
        )

    async def _stacks_of(self, name: str, actor: Any) -> str:
        try:
            ref = actor.stacks.options(concurrency_group=HEALTH_GROUP).remote()
            return str(await await_ref(ref, timeout_s=STACKS_TIMEOUT_S, where=f"{name}.stacks"))
        except RlhfError as error:  # a process that is stopped has nothing to say, which says enough
            return f"no stacks: {error}\n"
