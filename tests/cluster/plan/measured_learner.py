"""A real learner in a process of its own, and the most memory that it had: ``python -m`` with one JSON argument.

Only anonymous memory counts: the pages of a mapped weight file can be given back at any time.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from actors.ranks import ProcessGroup, RankInfo
from actors.settings import LearnerConfig
from actors.store import LocalStore
from rlhf.config import validate
from rlhf.objectives.config import SupervisedConfig
from rlhf.types import TrainGroup


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Peak(threading.Thread):
    """Looks every few milliseconds until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.003):
            self.most = max(self.most, anonymous_bytes())


def measure(asked: dict[str, Any]) -> int:
    """Trains two steps of two micro-batches; bytes at the peak, above what the imports take."""
    import deepspeed  # noqa: F401 - its own memory is none of the learner's
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from actors.learner import LearnerWorker

    info = RankInfo(0, 1)
    group = ProcessGroup(info, timeout_s=60)
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, 40_000, count).astype(np.int32)

    groups = [
        TrainGroup(
            uid=str(i),
            prompt_ids=tokens(asked["prompt"]),
            completion_ids=tuple(tokens(asked["completion"]) for _ in range(asked["siblings"])),
        )
        for i in range(2 * asked["rows"])
    ]
    worker = LearnerWorker(
        validate(LearnerConfig, asked["learner"], "asked"),
        LocalStore(),
        info,
        objective=SupervisedConfig(),
        total_steps=2,
    )
    torch.ones(512, 512).matmul(torch.ones(512, 512))  # the libraries' own threads and buffers
    before = anonymous_bytes()
    peak = Peak()
    peak.start()
    worker.start()
    for _ in range(2):
        worker.train_step(groups)
    peak.stopped.set()
    peak.join()
    worker.stop()
    group.close()
    return peak.most - before


if __name__ == "__main__":
    print(json.dumps({"peak": measure(json.loads(sys.argv[1]))}))
