"""Fakes of the roles, for loops without Ray: handles are the objects themselves, and every call is written down."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.loops.online import Hooks, LoopConfig, OnlineRoles
from rlhf.types import GroupHandle, Judgement, Prompt, Score, Verdict


def make_prompts(num_prompts: int) -> list[Prompt]:
    """Prompts ``p0``, ``p1``, ... of three tokens."""
    return [Prompt(f"p{i}", (), (1, 2, 3)) for i in range(num_prompts)]


def make_group(uid: str, version: int = 0, lengths: Sequence[int] = (2, 4)) -> GroupHandle:
    """A group whose payload is its uid."""
    return GroupHandle(uid, uid, 3, tuple(lengths), (version, version))


async def breathe(times: int = 3) -> None:
    """Lets every other task run, as a real call would."""
    for _ in range(times):
        await asyncio.sleep(0)


class FakePrompts:
    """An endless stream of unique prompts."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        start, self.position = self.position, self.position + num_prompts
        return [Prompt(f"p{i}", (), (1, 2, 3)) for i in range(start, self.position)]

    def state(self) -> Mapping[str, Any]:
        return {"position": self.position}


class FakeGate:
    """An exclusive gate that remembers who held it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.holders: list[str] = []

    @contextlib.asynccontextmanager
    async def hold(self, role: str):
        async with self.lock:
            self.holders.append(role)
            yield


class OpenGate:
    """A gate at which nobody waits: every role has devices of its own."""

    @contextlib.asynccontextmanager
    async def hold(self, role: str):
        yield


class FakeRun:
    """All roles of an online run over one log of calls.

    ``fail`` maps a call, for example ``("update", 2)``, to the error that it raises; calls count from 0 within
    their kind.
    """

    def __init__(
        self,
        *,
        gate: Any = None,
        position: int = 0,
        version: int = 0,
        num_scored: int = 0,
        fail: Mapping[tuple[str, int], Exception] | None = None,
    ) -> None:
        self.log: list[tuple[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.fail = dict(fail or {})
        self.gate = gate or FakeGate()
        self.prompts = FakePrompts(position)
        self.serving = version
        self.num_scored = num_scored
        self.score_of: Callable[[str, int], Score] = lambda uid, sibling: Score(float(sibling))
        self.drawn: list[tuple[str, ...]] = []
        self.trained: list[tuple[str, ...]] = []
        self.trained_groups: list[tuple[GroupHandle, ...]] = []
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.versions: list[int] = []
        self.exact: list[bool] = []
        self.recorded: dict[int, tuple[str, ...]] = {}
        self.recorded_groups: dict[int, tuple[GroupHandle, ...]] = {}
        self.metrics: dict[int, Mapping[str, float]] = {}
        self.checkpoints: dict[int, Mapping[str, Any]] = {}
        self.stop_after: int | None = None
        self.name = "fake"

    async def _call(self, kind: str, what: Any) -> None:
        number = self.counts[kind]
        self.counts[kind] += 1
        self.log.append((kind, what))
        await breathe()
        if (kind, number) in self.fail:
            raise self.fail[kind, number]

    async def generate(
        self, prompts: Sequence[Prompt], *, num_samples: int, version: int, exact: bool = False
    ) -> list[GroupHandle]:
        assert self.serving >= version, "asked for weights that nobody serves"
        assert not exact or self.serving == version, "asked for weights that are gone"
        self.exact.append(exact)
        self.versions.append(version)
        drawn_from = self.serving
        await self._call("generate", version)
        self.log.append(("generated", version))
        self.drawn.append(tuple(p.uid for p in prompts))
        groups = [make_group(p.uid, drawn_from, (2,) * num_samples) for p in prompts]
        return [dataclasses.replace(g, payload=f"{g.uid}, draw {len(self.drawn)}") for g in groups]

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        await self._call("score", groups[0].uid)
        self.num_scored += len(groups)
        return [tuple(self.score_of(g.uid, k) for k in range(len(g.completion_lengths))) for g in groups]

    def state(self) -> Mapping[str, Any]:
        return {"num_scored": self.num_scored}

    async def judge(self, groups: Sequence[GroupHandle]) -> list[Judgement]:
        await self._call("judge", groups[0].uid)
        return [self._judgement(group) for group in groups]

    def _judgement(self, group: GroupHandle) -> Judgement:
        scores = tuple(self.score_of(group.uid, k) for k in range(len(group.completion_lengths)))
        verdicts = tuple(Verdict(group.uid, (k,), score.value) for k, score in enumerate(scores))
        errors = tuple(score.error for score in scores if score.value is None)
        return Judgement(group.uid, verdicts, scores, len(verdicts), errors)

    async def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        await self._call("annotate", groups[0].uid)
        number = self.counts["annotate"]
        return [dataclasses.replace(g, annotations={"values": f"{g.payload}, call {number}"}) for g in groups]

    async def update(self, groups: Sequence[GroupHandle]) -> Mapping[str, float]:
        await self._call("update", len(self.trained))
        self.trained.append(tuple(g.uid for g in groups))
        self.trained_groups.append(tuple(groups))
        self.log.append(("updated", len(self.trained) - 1))
        return {"loss": 0.5}

    async def publish(self, version: int) -> Mapping[str, float]:
        await self._call("publish", version)
        self.serving = version
        return {"seconds": 0.25}

    async def record(self, step: int, groups: Sequence[GroupHandle]) -> None:
        await self._call("record", step)
        self.recorded[step] = tuple(g.uid for g in groups)
        self.recorded_groups[step] = tuple(groups)

    async def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        await self._call("log", step)
        self.metrics[step] = metrics

    async def evaluate(self, num_updates: int) -> None:
        await self._call("evaluate", num_updates)

    async def checkpoint(self, num_updates: int, state: Mapping[str, Any]) -> None:
        await self._call("checkpoint", num_updates)
        self.checkpoints[num_updates] = dict(state)

    def should_stop(self) -> bool:
        return self.stop_after is not None and len(self.trained) >= self.stop_after

    @property
    def roles(self) -> OnlineRoles:
        return OnlineRoles(
            prompts=self.prompts,
            generator=self,
            rewards=self,
            annotators={"critic": self},
            learners={"learner": self},  # type: ignore[dict-item]
            publisher=self,
            recorder=self,
            gate=self.gate,
        )

    @property
    def hooks(self) -> Hooks:
        return Hooks(self.log_step, self.evaluate, self.checkpoint, self.should_stop, self.event)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def loop_config(**changes: Any) -> LoopConfig:
    """Four steps of two prompts with two siblings."""
    given = {"steps": 4, "prompts_per_step": 2, "num_samples": 2, "step_timeout_s": 5.0, "checkpoint_every": 100}
    return LoopConfig(**(given | changes))
