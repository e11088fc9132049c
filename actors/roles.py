"""The seams of ``rlhf.protocols`` over fleets: what loops call, and which worker method answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from actors.dispatch import Missing
from actors.fleet import Fleet
from rlhf.errors import EngineError, JudgeError, ReplicaLostError, RlhfError, ScorerError
from rlhf.feedback.rankings import RankingConfig
from rlhf.types import GroupHandle, Judgement, Prompt, Score

if TYPE_CHECKING:
    from actors.remote_recorder import RemoteRecorder

Meter = Callable[[str, int, float], None]
"""Receives a role, the tokens it worked through and the seconds that took."""


@contextlib.contextmanager
def _failing_as(kind: type[RlhfError]) -> Iterator[None]:
    """What a fleet could not make good becomes the error that the seam promises; a deadline stays one."""
    try:
        yield
    except ReplicaLostError as error:
        raise kind(error.where, found=error.found, needed=error.needed, action=error.action) from error


async def _metered(
    fleet: Fleet, meter: Meter, method: str, groups: Sequence[GroupHandle], *, missing: Missing | None = None
) -> list[Any]:
    """Shares groups out over a fleet and meters their tokens; results in the groups' order."""
    began = time.monotonic()
    found = await fleet.scatter(method, list(groups), missing=missing)
    meter(fleet.role, sum(group.num_tokens for group in groups), time.monotonic() - began)
    return found


def _no_scores(group: GroupHandle, why: str) -> tuple[Score, ...]:
    return (Score(None, error=why),) * len(group.completion_lengths)


def _no_judgement(group: GroupHandle, why: str) -> Judgement:
    """No verdict was put anywhere, and each of those asked for is missing."""
    scores = _no_scores(group, why)
    return Judgement(group.uid, (), scores, len(scores), (why,) * len(scores))


class FleetGenerator:
    """``Generator`` over ``GenerationWorker`` replicas: one contiguous share of the prompts each, in index order."""

    def __init__(self, fleet: Fleet, meter: Meter) -> None:
        self._fleet = fleet
        self._meter = meter

    async def generate(
        self, prompts: Sequence[Prompt], *, num_samples: int, version: int, exact: bool = False
    ) -> list[GroupHandle]:
        """See ``Generator.generate``."""
        began = time.monotonic()
        with _failing_as(EngineError):
            groups: list[GroupHandle] = await self._fleet.scatter_stream(
                "stream", list(prompts), num_samples, version, exact, may_lack=True
            )
        tokens = sum(length for group in groups for length in group.completion_lengths)
        self._meter(self._fleet.role, tokens, time.monotonic() - began)
        return groups


class FleetJudge:
    """``Judge`` and ``RewardSource`` over ``JudgeWorker`` replicas, under one constitution.

    Args:
        fleet: The replicas.
        constitution: Which of theirs.
        meter: Is told the tokens that they read, where these are known.
        shuffled: Whether verdicts are dealt out at random: the null arm.
    """

    name = "judge"

    def __init__(self, fleet: Fleet, constitution: str, meter: Meter, *, shuffled: bool = False) -> None:
        self._fleet = fleet
        self._constitution = constitution
        self._meter = meter
        self._shuffled = shuffled

    async def judge(self, groups: Sequence[GroupHandle]) -> list[Judgement]:
        """See ``Judge.judge``."""
        with _failing_as(JudgeError):
            return await self._judge(groups)

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """See ``RewardSource.score``: signed, centred margins."""
        with _failing_as(ScorerError):
            return [judgement.scores for judgement in await self._judge(groups)]

    async def _judge(self, groups: Sequence[GroupHandle]) -> list[Judgement]:
        began = time.monotonic()
        asked = (self._constitution, self._shuffled)
        given: list[Judgement] = await self._fleet.scatter("judge", list(groups), *asked, missing=_no_judgement)
        if num_tokens := sum(judgement.num_tokens for judgement in given):
            self._meter(self._fleet.role, num_tokens, time.monotonic() - began)
        return given


class FleetScorer:
    """``RewardSource`` over ``ScorerWorker`` or rule replicas."""

    def __init__(self, name: str, fleet: Fleet, meter: Meter) -> None:
        self.name = name
        self._fleet = fleet
        self._meter = meter

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """See ``RewardSource.score``."""
        with _failing_as(ScorerError):
            return await _metered(self._fleet, self._meter, "score", groups, missing=_no_scores)


class FleetAnnotator:
    """``Annotator`` over ``ReferenceWorker`` replicas."""

    def __init__(self, fleet: Fleet, meter: Meter) -> None:
        self._fleet = fleet
        self._meter = meter

    async def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        """See ``Annotator.annotate``."""
        return await _metered(self._fleet, self._meter, "annotate", groups)


class StageRecorder:
    """``Recorder`` and ``LabelRecorder`` of one stage: what it writes stands under its name.

    Args:
        recorder: The run's.
        stage: The stage's name.
        ranking: How the feedback stage's verdicts become rankings.
    """

    def __init__(self, recorder: RemoteRecorder, stage: str, ranking: RankingConfig | None = None) -> None:
        self._recorder = recorder
        self._stage = stage
        self._ranking = ranking or RankingConfig()

    async def record(self, step: int, groups: Sequence[GroupHandle]) -> None:
        """See ``Recorder.record``."""
        await self._recorder.call("record", self._stage, step, list(groups))

    async def record_chunk(self, chunk: int, groups: Sequence[GroupHandle], judgements: Sequence[Judgement]) -> None:
        """See ``LabelRecorder.record_chunk``."""
        await self._recorder.call("record_chunk", self._stage, chunk, list(groups), list(judgements), self._ranking)

    async def has_chunk(self, chunk: int) -> bool:
        """See ``LabelRecorder.has_chunk``."""
        return bool(await self._recorder.call("has_chunk", self._stage, chunk))
