"""What the ranks of the memory tests do: train with pauses in which everything is put aside, and without."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.host_memory import storage_id
from actors.learner import LearnerWorker
from actors.ranks import RankInfo
from actors.store import LocalStore
from rlhf.errors import LearnerError
from rlhf.models.settings import LoraConfig
from rlhf.objectives.config import SupervisedConfig
from tests.actors.learner_work import learner_config, share, weights
from tests.rlhf.models.conftest import make_groups

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"stage": 0},
    "bf16": {"stage": 0, "dtype": "bfloat16"},
    "adapter": {"stage": 0, "adapter": LoraConfig(rank=4)},
    "stage2": {"stage": 2, "dtype": "bfloat16"},
    "stage3": {"stage": 3, "dtype": "bfloat16"},
}


def tensor_bytes(device: str = "cpu") -> int:
    """Bytes of all storages on a device that Python knows of in this process."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type == device]
    return sum({storage_id(one): one.untyped_storage().nbytes() for one in tensors}.values())


def memory_cases(info: RankInfo, model: Path, scratch: Path) -> dict[str, Any]:
    """Per case: what two learners from the same start come to, one of them with pauses."""
    return {name: _pauses(info, model, scratch / name, fields) for name, fields in CASES.items()}


def _pauses(info: RankInfo, model: Path, folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    groups = share(make_groups(8, 2), info)
    results: dict[str, Any] = {}
    for name in ("straight", "paused"):
        worker = LearnerWorker(
            learner_config(model, **fields), LocalStore(), info, objective=SupervisedConfig(), total_steps=10
        )
        gc.collect()  # what the learner before left behind
        before = tensor_bytes()
        worker.start()
        _unmap(worker)
        metrics = []
        for step in range(3):
            if name == "paused" and step:
                results |= _pause(worker, groups, before)
            metrics.append(worker.train_step(groups))
        if name == "paused":
            worker.reside(())
            worker.reside(("weights",))
        exported = weights(worker)
        worker.reside(("weights", "state"))
        folder.mkdir(parents=True, exist_ok=True)
        worker.barrier()
        worker.save(str(folder))
        results[name] = metrics, exported
        worker.stop()
    straight, paused = results.pop("straight"), results.pop("paused")
    results["same metrics"] = straight[0] == paused[0]
    results["same weights"] = all(np.array_equal(value, paused[1][key]) for key, value in straight[1].items())
    results["num weights"] = len(paused[1])
    return results


def _unmap(worker: LearnerWorker) -> None:
    """Copies weights that still lie in the mapped file: on a CPU nobody else has, and those cannot be given back."""
    for parameter in worker._engine.module.parameters():
        if not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()


def _pause(worker: LearnerWorker, groups: list[Any], before: int) -> dict[str, Any]:
    """Puts the learner aside in several ways; ends with all of it in place."""
    whole = tensor_bytes() - before
    worker.reside(("weights",))
    only_weights = tensor_bytes() - before
    worker.reside(())
    nothing = tensor_bytes() - before
    try:
        worker.train_step(groups)
        refused = ""
    except LearnerError as error:
        refused = str(error)
    worker.reside(("state",))
    worker.reside(())
    worker.reside(())
    worker.reside(("weights", "state"))
    return {
        "whole": whole,
        "only weights": only_weights,
        "nothing": nothing,
        "again": tensor_bytes() - before,
        "refused": refused,
    }
