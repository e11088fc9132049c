"""What the ranks of the GPU tests do, in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actors.deepspeed.config import OptimConfig
from actors.learner import LearnerWorker
from actors.ranks import RankInfo
from actors.store import LocalStore
from rlhf.objectives.config import SupervisedConfig
from tests.actors.learner_work import learner_config, weights
from tests.actors.memory_work import tensor_bytes
from tests.rlhf.models.conftest import make_groups

OPTIM = OptimConfig(lr=1e-3)


def updates(info: RankInfo, model: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Four supervised updates, with everything put aside after each of them where ``pauses`` is set."""
    fields = dict(fields)
    pauses = fields.pop("pauses", False)
    worker = LearnerWorker(
        learner_config(model, optim=OPTIM, **fields), LocalStore(), info, objective=SupervisedConfig(), total_steps=4
    )
    worker.start()
    groups = make_groups(8, 2)
    metrics, free = [], []
    for _ in range(4):
        metrics.append(worker.train_step(groups))
        if pauses:
            tensors, before = tensor_bytes("cuda"), torch.cuda.memory_allocated()
            worker.reside(())
            free.append((tensors, before, torch.cuda.memory_allocated()))
            worker.reside(("weights",))
            worker.reside(("weights", "state"))
    exported = weights(worker)
    worker.stop()
    return {"metrics": metrics, "weights": exported, "free": free}


def all_updates(info: RankInfo, model: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One process for every case, as importing the libraries takes longer than all of them together."""
    return {name: updates(info, model, fields) for name, fields in cases.items()}


def copies(info: RankInfo, model: Path, scratch: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per case: a state copied from the device and written while training goes on, against one written at once."""
    results: dict[str, Any] = {}
    groups = make_groups(8, 2)
    for name, fields in cases.items():
        config = learner_config(model, optim=OPTIM, **fields)
        worker = LearnerWorker(config, LocalStore(), info, objective=SupervisedConfig(), total_steps=10)
        worker.start()
        worker.train_step(groups)
        at_once = worker.save(str(scratch / name / "at_once"))
        place = str(scratch / name / "copied")
        worker.begin_save(place)
        straight = [worker.train_step(groups)["nll"] for _ in range(2)]
        copied = worker.saved(60.0).files or {}
        fault = worker.verify(place, copied)
        worker.load(place)
        again = [worker.train_step(groups)["nll"] for _ in range(2)]
        worker.stop()
        results[name] = {"at once": at_once, "copied": copied, "fault": fault, "straight": straight, "again": again}
    return results
