"""The recorder as a real actor: it writes straight from the object store and keeps what dead workers put."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from actors.judge import Answer, JudgeBase
from actors.recorder import RecorderWorker
from actors.store import RayStore
from rlhf.errors import RecordError
from rlhf.feedback.rankings import RankingConfig
from rlhf.types import GroupHandle, Score
from tests.actors.judging import make_group as make_review
from tests.actors.judging import write_constitution
from tests.actors.test_recorder import SCORES, assert_same_group, make_group, make_handle

pytestmark = pytest.mark.engine
TIMEOUT_S = 60.0


class Producer:
    """Puts groups into the store under the recorder's ownership, as a generation replica does."""

    def __init__(self, store: RayStore) -> None:
        self._store = store

    def produce(self, index: int) -> GroupHandle:
        group = make_group(index)
        handle = make_handle(group, SCORES)
        return GroupHandle(
            handle.uid,
            self._store.put(group),
            handle.prompt_length,
            handle.completion_lengths,
            handle.weight_versions,
            handle.scores,
        )


@pytest.fixture
def ray_module(ray_cluster: None) -> Any:
    import ray

    return ray


def test_records_outlive_the_worker_that_drew_them(ray_module: Any, tmp_path: Path) -> None:
    ray = ray_module
    recorder = ray.remote(RecorderWorker).options(num_cpus=0.1).remote(tmp_path, RayStore())
    ray.get(recorder.ping.remote(), timeout=TIMEOUT_S)
    producer = ray.remote(Producer).options(num_cpus=0.1).remote(RayStore(recorder))
    handles = [ray.get(producer.produce.remote(index), timeout=TIMEOUT_S) for index in range(2)]
    ray.kill(producer)
    for handle in handles:
        assert ray.get(handle.payload, timeout=TIMEOUT_S).prompt.uid == handle.uid
    assert ray.get(recorder.record.remote("rl", 3, handles), timeout=TIMEOUT_S) == 8
    assert (tmp_path / "rollouts" / "rl.step_000003.parquet").is_file()

    back = ray.get(recorder.read_groups.remote("rl", "step_000003"), timeout=TIMEOUT_S)
    assert all(isinstance(handle.payload, ray.ObjectRef) for handle in back), "the driver gets handles, not texts"
    assert [handle.scores for handle in back] == [SCORES, SCORES]
    for index, handle in enumerate(back):
        assert_same_group(ray.get(handle.payload, timeout=TIMEOUT_S), make_group(index))
    assert isinstance(back[0].scores[0], Score)

    with pytest.raises(RecordError, match="absent"):
        ray.get(recorder.read_groups.remote("rl", "absent"), timeout=TIMEOUT_S)
    ray.kill(recorder)


class WordyJudge(JudgeBase):
    """Likes the first of two texts, and thinks long of its reasons."""

    async def _open(self) -> None:
        pass

    def _check(self, name: str, constitution: Any) -> None:
        pass

    async def _ask(self, requests: Any) -> list[Answer]:
        return [Answer({label: -1.0 - i for label in r.labels}, num_tokens=10) for i, r in enumerate(requests)]

    async def stop(self) -> None:
        pass


def test_verdicts_go_from_the_judge_to_the_disk_and_the_driver_has_handles(ray_module: Any, tmp_path: Path) -> None:
    ray = ray_module
    recorder = ray.remote(RecorderWorker).options(num_cpus=0.1, max_concurrency=4).remote(tmp_path, RayStore())
    store = RayStore(recorder)
    files = {"train": write_constitution(tmp_path)}
    judge = ray.remote(WordyJudge).options(num_cpus=0.1).remote("wordy", files, store, seed=1)
    ray.get(judge.start.remote(), timeout=TIMEOUT_S)
    groups = []
    for uid in ("a", "b"):
        local = make_review(uid, [f"{uid} one", f"{uid} two"])  # all different: an answer that is known reads nothing
        groups.append(dataclasses.replace(local, payload=store.put(local.payload)))
    judgements = ray.get(judge.judge.remote(groups, "train"), timeout=TIMEOUT_S)
    assert all(isinstance(judgement.verdicts, ray.ObjectRef) for judgement in judgements)
    assert b"log p(" not in ray.cloudpickle.dumps(judgements), "no reason passes the driver"
    assert [judgement.num_tokens for judgement in judgements] == [20, 20]
    ray.kill(judge)

    ray.get(recorder.record_chunk.remote("ask", 0, groups, judgements, RankingConfig()), timeout=TIMEOUT_S)
    scored = [dataclasses.replace(g, scores=j.scores) for g, j in zip(groups, judgements, strict=True)]
    assert ray.get(recorder.record.remote("rl", 0, scored), timeout=TIMEOUT_S) == 4
    for stage, part in (("ask", "chunk_0000"), ("rl", "step_000000")):
        verdicts = ray.get(recorder.read_verdicts.remote(stage, part), timeout=TIMEOUT_S)
        assert [(verdict.uid, verdict.samples) for verdict in verdicts] == [(u, (k,)) for u in "ab" for k in (0, 1)]
        assert all("log p(' yes')" in verdict.reason for verdict in verdicts)
    ray.kill(recorder)
