"""The loops with a judge and the recorder in the process itself: what they ask for, and what is then on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.judge import JudgeBase
from actors.recorder import RecorderWorker
from actors.roles import FleetJudge, StageRecorder
from actors.store import LocalStore
from rlhf.errors import MissingFeedbackError
from rlhf.loops.gate import GatedSource
from rlhf.loops.label import LabelConfig, LabelRoles, label
from rlhf.loops.online import OnlineRoles, train_online
from rlhf.rewards.config import JudgePart
from rlhf.rewards.mixture import Mixture
from rlhf.runs.tables import read_table
from rlhf.types import GroupHandle, Message, Prompt
from tests.actors.judging import make_group, write_constitution
from tests.actors.test_judge import ReadingJudge
from tests.fakes import FakeRun, loop_config


class LocalFleet:
    """One worker that is called at once."""

    role = "judge"

    def __init__(self, worker: JudgeBase) -> None:
        self.worker = worker

    async def scatter(self, method: str, items: Sequence[Any], *args: Any, missing: Any = None) -> Any:
        return await getattr(self.worker, method)(items, *args)


class LocalRecorder:
    """The recorder's worker, called at once."""

    def __init__(self, worker: RecorderWorker) -> None:
        self.worker = worker

    async def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)


class Writer(FakeRun):
    """Draws reviews, the later siblings better ones; those of ``p2`` cannot be judged."""

    async def generate(
        self, prompts: Sequence[Prompt], *, num_samples: int, version: int, exact: bool = False
    ) -> list[GroupHandle]:
        await super().generate(prompts, num_samples=num_samples, version=version, exact=exact)
        word = {"p2": "mute "}
        return [
            make_group(p.uid, [f"{p.uid} {word.get(p.uid, 'good ') * (k + 1)}" for k in range(num_samples)])
            for p in prompts
        ]


@pytest.fixture
def worker(tmp_path: Path) -> RecorderWorker:
    return RecorderWorker(tmp_path / "run", LocalStore())


def judge_of(folder: Path, metered: list[tuple[str, int]], **options: bool) -> FleetJudge:
    judge = ReadingJudge({"training": write_constitution(folder)})
    asyncio.run(judge.start())
    meter = lambda role, tokens, seconds: metered.append((role, tokens))  # noqa: E731
    return FleetJudge(LocalFleet(judge), "training", meter, **options)  # type: ignore[arg-type]


def prompts(num_prompts: int) -> list[Prompt]:
    return [
        Prompt(f"p{i}", (Message("user", "Write."),), (1,), {"request": "enthusiastic"}) for i in range(num_prompts)
    ]


def values(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    return [row["value"] for row in rows]


@pytest.mark.parametrize("shuffled", [False, True])
def test_feedback_is_ranked_and_written_where_the_verdicts_are(
    tmp_path: Path, worker: RecorderWorker, shuffled: bool
) -> None:
    run, metered = Writer(), []
    recorder = StageRecorder(LocalRecorder(worker), "ask")  # type: ignore[arg-type]
    roles = LabelRoles(run, judge_of(tmp_path, metered, shuffled=shuffled), recorder, run.gate, run.event)
    config = LabelConfig(num_samples=3, prompts_per_chunk=2, max_missing_fraction=0.5)
    with pytest.raises(MissingFeedbackError, match="feedback chunk 1"):  # p2 is all of its chunk
        asyncio.run(label(roles, config, prompts(3), version=0, progress=lambda _: None))
    assert worker.parts("groups", "ask") == ["chunk_0000"]
    asyncio.run(label(roles, config, prompts(4), version=0, progress=lambda _: None))
    assert worker.feedback_counts("ask") == {"num_verdicts": 12, "missing_fraction": 0.25, "num_rankings": 3}
    ranks = {ranking.uid: ranking.ranks for ranking in worker.feedback_rankings("ask")}
    assert ranks["p2"] == (None, None, None)
    assert sorted(ranks["p0"]) == [1, 2, 3] and (shuffled or ranks["p0"] == (3, 2, 1))
    run_dir = tmp_path / "run"
    verdicts = read_table(run_dir / "verdicts" / "ask.chunk_0000.parquet")
    rollouts = read_table(run_dir / "rollouts" / "ask.chunk_0000.parquet")
    assert values(verdicts) == [row["score"] for row in rollouts], "a score is its verdict's value"
    assert all(row["reason"].startswith("shuffled; was: ") == shuffled for row in verdicts)
    assert {role for role, _ in metered} == {"judge"} and min(tokens for _, tokens in metered) > 0


def test_the_verdicts_of_every_step_are_kept_with_its_rollouts(tmp_path: Path, worker: RecorderWorker) -> None:
    run, metered = Writer(), []
    judge = GatedSource(judge_of(tmp_path, metered), run.gate, "judge")
    given = run.roles
    roles = OnlineRoles(
        prompts=given.prompts,
        generator=run,
        rewards=Mixture([judge], [JudgePart(source="judge", weight=2.0)]),
        annotators={},
        learners=given.learners,
        publisher=run,
        recorder=StageRecorder(LocalRecorder(worker), "rl"),  # type: ignore[arg-type]
        gate=run.gate,
    )
    asyncio.run(train_online(roles, loop_config(steps=2, max_missing_fraction=0.5), run.hooks))
    assert run.gate.holders[:4] == ["generation", "judge", "learner", "publish"]
    for step in range(2):
        part = f"rl.step_{step:06d}.parquet"
        rollouts = read_table(tmp_path / "run" / "rollouts" / part)
        verdicts = read_table(tmp_path / "run" / "verdicts" / part)
        assert [row["uid"] for row in rollouts] == [row["uid"] for row in verdicts]
        assert [row["score"] for row in rollouts] == [None if v is None else 2.0 * v for v in values(verdicts)]
        assert [row["text"] for row in rollouts] == [text for row in verdicts for text in row["texts"]]
        assert [row["error"] for row in verdicts] == ["it said nothing" if v is None else "" for v in values(verdicts)]
        assert all("log p(" in row["reason"] for row in verdicts if row["value"] is not None)
    assert None in values(verdicts) and len(metered) == 2
