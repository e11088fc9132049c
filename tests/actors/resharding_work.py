"""What the ranks of the resharding tests do: save on one number of ranks and go on on another.

Gangs of one and of two ranks run side by side. Each trains, saves and trains on; then each loads what the other one
saved, and trains on from there.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.learner import LearnerWorker
from actors.ranks import RankInfo
from actors.store import LocalStore
from rlhf.errors import CheckpointError
from rlhf.models.settings import LoraConfig
from rlhf.objectives.config import SupervisedConfig
from rlhf.runs.places import FileEntry
from tests.actors.learner_work import learner_config, share, weights
from tests.rlhf.models.conftest import make_groups

BF16: dict[str, Any] = {"dtype": "bfloat16"}
ADAPTER: dict[str, Any] = {"adapter": LoraConfig(rank=4)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 0": ({"stage": 0}, {"stage": 0}),
    "stage 1": ({"stage": 1}, {"stage": 1}),
    "stage 2": ({"stage": 2}, {"stage": 2}),
    "stage 3": ({"stage": 3}, {"stage": 3}),
    "bf16 stage 0": (BF16 | {"stage": 0}, BF16 | {"stage": 0}),
    "bf16 stage 1": (BF16 | {"stage": 1}, BF16 | {"stage": 1}),
    "bf16 stage 3": (BF16 | {"stage": 3}, BF16 | {"stage": 3}),
    "adapter stage 0": (ADAPTER | {"stage": 0}, ADAPTER | {"stage": 0}),
    "adapter stage 2": (ADAPTER | {"stage": 2}, ADAPTER | {"stage": 2}),
    "adapter stage 3": (ADAPTER | {"stage": 3}, ADAPTER | {"stage": 3}),
    "stage 3 to 0": ({"stage": 3}, {"stage": 0}),
    "bf16 stage 0 to 2": (BF16 | {"stage": 0}, BF16 | {"stage": 2}),
}
"""What is saved, and what loads it."""


def started(info: RankInfo, model: Path, fields: dict[str, Any]) -> LearnerWorker:
    worker = LearnerWorker(
        learner_config(model, **fields), LocalStore(), info, objective=SupervisedConfig(), total_steps=10
    )
    worker.start()
    return worker


def saved(worker: LearnerWorker, place: str) -> dict[str, FileEntry]:
    """Every rank's files."""
    return {name: entry for files in worker.gather(worker.save(place)) for name, entry in files.items()}


def loaded(worker: LearnerWorker, place: str, files: Mapping[str, FileEntry]) -> None:
    assert worker.gather(worker.verify(place, files)) == [""] * len(worker.gather(0))
    worker.load(place)


def state_of(worker: LearnerWorker) -> dict[str, np.ndarray]:
    """All fp32 weights and means of all ranks, whole, by name."""
    layout = worker._engine._layout()
    own = [
        (f"{kind}/{fragment.name}", fragment.shape, fragment.start, tensor.detach().float().numpy().copy())
        for fragment in layout.fragments
        for kind, tensor in layout.tensors_of(fragment).items()
    ]
    whole: dict[str, np.ndarray] = {}
    for pieces in worker.gather(own):
        for name, shape, start, values in pieces:
            flat = whole.setdefault(name, np.full(int(np.prod(shape)), np.nan, np.float32))
            flat[start : start + len(values)] = values
    return whole


def exchanged(info: RankInfo, model: Path, meeting: Path) -> dict[str, Any]:
    """Per case: the state that the other gang saved against what came of it here, and how training went on."""
    mine, theirs = f"{info.world_size} ranks", f"{3 - info.world_size} ranks"
    groups = share(make_groups(8, 2), info)
    told: dict[str, Any] = {}
    for case, (fields, _) in CASES.items():
        worker = started(info, model, fields)
        for _ in range(2):
            worker.train_step(groups)
        place = str(meeting / mine / case)
        state, exported = state_of(worker), weights(worker)
        files = saved(worker, place)
        losses = [worker.train_step(groups)["nll"] for _ in range(3)]
        told[case] = {"files": files, "losses": losses, "state": state, "weights": exported, "place": place}
        worker.stop()
    if info.rank == 0:
        (meeting / f"{mine}.part").write_bytes(pickle.dumps(told))
        (meeting / f"{mine}.part").rename(meeting / f"{mine}.told")
    return _taken_over(info, model, _wait_for(meeting / f"{theirs}.told"), groups)


def _wait_for(path: Path, timeout_s: float = 300.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, "the other gang did not save"
        time.sleep(0.1)
    found: dict[str, Any] = pickle.loads(path.read_bytes())
    return found


def _taken_over(info: RankInfo, model: Path, told: dict[str, Any], groups: list[Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case, (_, fields) in CASES.items():
        before = told[case]
        worker = started(info, model, fields)
        loaded(worker, before["place"], before["files"])
        state, exported = state_of(worker), weights(worker)
        random = worker.gather(torch.get_rng_state().tolist())
        results[case] = {
            "same names": state.keys() == before["state"].keys(),
            "same state": all(np.array_equal(values, before["state"][name]) for name, values in state.items()),
            "means": sum(name.startswith("exp_avg") for name in state),
            "same weights": all(np.array_equal(v, before["weights"][n]) for n, v in exported.items()),
            "num weights": len(exported),
            "losses": [worker.train_step(groups)["nll"] for _ in range(3)],
            "expected": before["losses"],
            "different random states": len({tuple(one) for one in random}) == len(random),
        }
        worker.stop()
    return results


def same_ranks(info: RankInfo, model: Path, scratch: Path) -> dict[str, Any]:
    """On as many ranks: a copy that is written while training goes on, a URL, damage, and a model that does not fit."""
    groups = share(make_groups(8, 2), info)
    worker = started(info, model, {"stage": 2})
    worker.train_step(groups)
    at_once = saved(worker, str(scratch / "at once"))
    worker.begin_save(str(scratch / "copied"))
    losses = [worker.train_step(groups)["nll"] for _ in range(2)]
    status = worker.saved(60.0)
    copied = {name: entry for files in worker.gather(status.files) for name, entry in files.items()}
    loaded(worker, f"file://{scratch}/copied", copied)
    again = [worker.train_step(groups)["nll"] for _ in range(2)]
    worker.barrier()
    if info.rank == 0:
        damaged = scratch / "at once" / f"rank_{info.world_size - 1}.safetensors"
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(bytes(data))
    worker.barrier()
    faults = worker.gather(worker.verify(str(scratch / "at once"), at_once))
    worker.stop()

    other = started(info, model, {"stage": 2, **ADAPTER})
    before = weights(other)
    assert other.verify(str(scratch / "copied"), copied) == ""
    try:
        other.load(str(scratch / "copied"))
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    unchanged = all(np.array_equal(value, before[name]) for name, value in weights(other).items())
    other.stop()
    return {
        "same bytes": copied == at_once,
        "goes on": losses == again,
        "faults": faults,
        "refused": refused,
        "unchanged": unchanged,
        "files": sorted(at_once),
    }
