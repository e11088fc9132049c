"""The groups of one step or chunk, of which each is drawn again where it was lost.

Handles outlive the replica that drew a group, but neither the node that holds it nor the recorder that owns it. Whoever
reads a group that is gone raises ``RolloutsLostError`` with its uid; its prompt is then dispatched again, and all that
had been done to the group is done to the one that takes its place. The other groups stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rlhf.errors import RlhfError, RolloutsLostError, ValueLostError
from rlhf.feedback.missing import check_missing
from rlhf.protocols import Annotator, Generator, PhaseGate
from rlhf.types import GroupHandle, Prompt, Score

if TYPE_CHECKING:
    from rlhf.loops.online import OnlineRoles

T = TypeVar("T")
Event = Callable[..., None]
"""Writes one line of the event log: ``event(kind, name=value, ...)``."""
Work = Callable[[list[GroupHandle]], Awaitable[T]]

MAX_REDRAWS = 3
"""How often one group may be lost. A machine that goes away may take a restarted recorder with it once more; what is
lost again and again has another cause."""


async def repeated(work: Callable[[], Awaitable[T]], lost: Callable[[RlhfError], None]) -> T:
    """Does work that draws or reads all it needs by itself, from its start where some of that was lost meanwhile.

    Args:
        work: It must leave nothing behind when it fails that its repetition does not replace.
        lost: Is told of every loss.

    Raises:
        RolloutsLostError, ValueLostError: Something was lost more than ``MAX_REDRAWS`` times.
    """
    for _ in range(MAX_REDRAWS):
        try:
            return await work()
        except (RolloutsLostError, ValueLostError) as error:
            lost(error)
    return await work()


class Rollouts:
    """Groups of some prompts, in the prompts' order.

    Args:
        generator: Draws them, and draws lost ones again.
        gate: Who may compute.
        prompts: Their uids are unique.
        num_samples: Siblings per prompt.
        max_missing_fraction: Above this fraction of prompts without a group the run stops.
        version: Oldest weights that will do.
        exact: Whether later weights will not do.
        where: Names the step or chunk in events.
        event: Event log.
    """

    def __init__(
        self,
        generator: Generator,
        gate: PhaseGate,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        max_missing_fraction: float,
        version: int,
        exact: bool,
        where: str,
        event: Event,
    ) -> None:
        self.groups: list[GroupHandle] = []
        self._num_redraws: Counter[str] = Counter()
        self._generator, self._gate, self._prompts = generator, gate, tuple(prompts)
        self._num_samples, self._version, self._exact = num_samples, version, exact
        self._where, self._event = where, event
        self._max_missing_fraction = max_missing_fraction

    @property
    def drawn_again(self) -> set[str]:
        """Uids of the groups that were lost."""
        return set(self._num_redraws)

    async def draw(self) -> None:
        """Draws every group. A prompt that the generator gave up is left out from here on.

        Raises:
            MissingFeedbackError: Too many were.
        """
        self.groups = await self._generate(self._prompts)
        drawn = {group.uid for group in self.groups}
        if lacking := [prompt.uid for prompt in self._prompts if prompt.uid not in drawn]:
            self._event("prompts_dropped", where=self._where, uids=lacking)
            errors = ["the prompt could not be answered"] * len(lacking)
            check_missing(errors, len(self._prompts), self._max_missing_fraction, f"prompts of {self._where}")
            self._prompts = tuple(prompt for prompt in self._prompts if prompt.uid in drawn)

    async def over(self, work: Work[T]) -> T:
        """Does ``work`` on all groups, again where some were lost; it must leave nothing behind when it raises that.

        Raises:
            RolloutsLostError: A group was lost more than ``MAX_REDRAWS`` times.
        """
        while True:
            try:
                return await work(list(self.groups))
            except RolloutsLostError as error:
                await self._draw_again(error)

    async def under(self, role: str, work: Work[T]) -> T:
        """Like ``over``, with the gate held as ``role`` while ``work`` is done (not while groups are drawn again)."""

        async def gated(groups: list[GroupHandle]) -> T:
            async with self._gate.hold(role):
                return await work(groups)

        return await self.over(gated)

    async def _generate(self, prompts: Sequence[Prompt]) -> list[GroupHandle]:
        async with self._gate.hold("generation"):
            return await self._generator.generate(
                prompts, num_samples=self._num_samples, version=self._version, exact=self._exact
            )

    async def _draw_again(self, error: RolloutsLostError) -> None:
        places = [place for place, group in enumerate(self.groups) if group.uid in error.uids]
        lost = {self.groups[place].uid for place in places}
        if not lost or any(self._num_redraws[uid] >= MAX_REDRAWS for uid in lost):
            raise error
        self._num_redraws.update(lost)
        self._event("rollouts_drawn_again", where=self._where, uids=sorted(lost), error=str(error))
        again = await self._generate([self._prompts[place] for place in places])
        if len(again) != len(places):  # lost, and then given up
            raise error
        for place, group in zip(places, again, strict=True):
            self.groups[place] = group
        await self._catch_up(places)

    async def _catch_up(self, places: Sequence[int]) -> None:
        """Does to the groups that were drawn again what had been done to the others."""


class StepRollouts(Rollouts):
    """The groups of one step of the online loop, on their way from prompts to the learners.

    Args:
        roles: Of the loop.
        prompts: Of the step.
        num_samples: Siblings per prompt.
        max_missing_fraction: Above this fraction of missing scores, or of prompts without a group, the run stops.
        step: The step.
        version: Oldest weights that will do.
        exact: Whether later weights will not do.
        event: Event log.
    """

    def __init__(
        self,
        roles: OnlineRoles,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        max_missing_fraction: float,
        step: int,
        version: int,
        exact: bool,
        event: Event,
    ) -> None:
        super().__init__(
            roles.generator,
            roles.gate,
            prompts,
            num_samples=num_samples,
            max_missing_fraction=max_missing_fraction,
            version=version,
            exact=exact,
            where=f"step {step}",
            event=event,
        )
        self._roles = roles
        self._step = step
        self._done: list[Callable[[Sequence[int]], Awaitable[None]]] = []

    async def score(self) -> None:
        """Scores all groups; a group that is drawn again later is scored by itself.

        Raises:
            MissingFeedbackError: Too many scores of the step are missing.
        """
        self._set_scores(range(len(self.groups)), await self.over(self._roles.rewards.score))
        self._done.append(self._score_again)

    async def _score_again(self, places: Sequence[int]) -> None:
        async def score(groups: list[GroupHandle]) -> list[tuple[Score, ...]]:
            return await self._roles.rewards.score([groups[place] for place in places])

        self._set_scores(places, await self.over(score))

    def _set_scores(self, places: Sequence[int], scores: Sequence[tuple[Score, ...]]) -> None:
        for place, siblings in zip(places, scores, strict=True):
            self.groups[place] = dataclasses.replace(self.groups[place], scores=siblings)
        given = [score for group in self.groups for score in group.scores]
        errors = [score.error for score in given if score.value is None]
        check_missing(errors, len(given), self._max_missing_fraction, f"scores of {self._where}")

    async def annotate(self, role: str, annotator: Annotator) -> None:
        """Has ``annotator`` add its arrays to all groups."""
        self.groups = await self.under(role, annotator.annotate)
        self._done.append(functools.partial(self._annotate_again, role, annotator))

    async def _annotate_again(self, role: str, annotator: Annotator, places: Sequence[int]) -> None:
        # All of them are asked for, as a gang needs a group for every rank; the others keep what they have.
        annotated = await self.under(role, annotator.annotate)
        for place in places:
            self.groups[place] = annotated[place]

    async def record(self) -> None:
        """Writes all groups; whatever is trained on after this is on disk."""
        await self._write()
        self._done.append(self._write)

    async def _write(self, places: Sequence[int] = ()) -> None:
        await self.over(functools.partial(self._roles.recorder.record, self._step))

    async def _catch_up(self, places: Sequence[int]) -> None:
        for again in list(self._done):
            await again(places)
