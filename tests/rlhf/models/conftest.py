from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf.types import TrainGroup
from tests.tiny import build_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_groups(num_groups: int = 3, siblings: int = 3, seed: int = 0, vocabulary: int = 380) -> list[TrainGroup]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(3, vocabulary, rng.integers(low, high)).astype(np.int32)

    return [
        TrainGroup(uid=f"g{i}", prompt_ids=tokens(4, 9), completion_ids=tuple(tokens(1, 7) for _ in range(siblings)))
        for i in range(num_groups)
    ]
