"""The recorder as a real actor: it writes straight from the object store and keeps what dead workers put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.recorder import RecorderWorker
from actors.store import RayStore
from rlhf.errors import RecordError
from rlhf.types import GroupHandle, Score
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
    assert ray.get(recorder.record.remote(3, handles), timeout=TIMEOUT_S) == 8
    assert (tmp_path / "rollouts" / "step_000003.parquet").is_file()

    back = ray.get(recorder.read_groups.remote("step_000003"), timeout=TIMEOUT_S)
    assert all(isinstance(handle.payload, ray.ObjectRef) for handle in back), "the driver gets handles, not texts"
    assert [handle.scores for handle in back] == [SCORES, SCORES]
    for index, handle in enumerate(back):
        assert_same_group(ray.get(handle.payload, timeout=TIMEOUT_S), make_group(index))
    assert isinstance(back[0].scores[0], Score)

    with pytest.raises(RecordError, match="absent"):
        ray.get(recorder.read_groups.remote("absent"), timeout=TIMEOUT_S)
    ray.kill(recorder)
