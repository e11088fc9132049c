"""Rollouts live in the object store: what the driver gets of a group does not grow with its tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
from ray.experimental import get_object_locations

from actors.recorder import RecorderWorker
from actors.store import RayStore, Store
from rlhf.types import Completion, GroupHandle, Prompt, Rollout, RolloutGroup, VersionSpan


class Drawer:
    """Stands where a generation replica stands: it puts a group and returns its handle."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def draw(self, num_tokens: int) -> GroupHandle:
        tokens, log_probs = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.float32)
        completion = Completion(tokens, log_probs, "a" * num_tokens, "length", (VersionSpan(0, 0, num_tokens),))
        group = RolloutGroup(Prompt("p/0", (), (1, 2)), (Rollout(completion),) * 4)
        return GroupHandle("p/0", self._store.put(group), 2, (num_tokens,) * 4, (0, 0))


@pytest.mark.engine
@pytest.mark.usefixtures("ray_cluster")
def test_driver_bytes_do_not_grow_with_tokens_and_groups_live_in_the_store(tmp_path: Path) -> None:
    recorder = ray.remote(RecorderWorker).options(num_cpus=0.1).remote(run=tmp_path, store=RayStore())
    drawer = ray.remote(Drawer).options(num_cpus=0.1).remote(RayStore(recorder))
    sizes = {}
    for num_tokens in (48, 4096):
        handle = ray.get(drawer.draw.remote(num_tokens), timeout=60)
        sizes[num_tokens] = len(ray.cloudpickle.dumps(handle))
        location = get_object_locations([handle.payload])[handle.payload]
        assert location["node_ids"], "the group is in a node's object store, not inlined into the driver"
        assert location["object_size"] > 4 * num_tokens
        group = ray.get(handle.payload, timeout=60)
        assert group.rollouts[0].completion.token_ids.shape == (num_tokens,)
    assert abs(sizes[4096] - sizes[48]) <= 16
    assert sizes[4096] < 2000
    for actor in (drawer, recorder):
        ray.kill(actor)
