"""Ranks that fail under the real Ray Train: what is the same every time comes out once, what may pass is repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.training import fit_ranks
from rlhf.errors import DataError
from rlhf.runs.events import read_events
from tests.actors import failing_ranks
from tests.actors.test_offline_data import make_job

pytestmark = pytest.mark.engine


def fit(train: Callable[[dict[str, Any]], None], folder: Path) -> None:
    fit_ranks(
        train,
        make_job(folder, "sft"),
        num_ranks=2,
        cpus=0.5,
        gpus=0,
        strategy="PACK",
        max_restarts=3,
        start_timeout_s=120.0,
    )


def tries(folder: Path) -> list[int]:
    """Of each rank."""
    return [len(list(folder.glob(f"rank{rank}-*"))) for rank in range(2)]


def test_a_gang_that_was_lost_starts_again_and_a_ranks_own_error_comes_out_once(
    tmp_path: Path, ray_cluster: None
) -> None:
    with pytest.raises(DataError) as caught:
        fit(failing_ranks.lost_at_first_and_bad_data_then, tmp_path)
    assert str(caught.value) == "groups:7: found a broken row; needed a whole one. Mend the row."
    assert tries(tmp_path) == [2, 2], "once more for the network, and never for the data"
    [event] = read_events(tmp_path / "events.jsonl")
    assert (event["kind"], event["stage"], event["restarts_left"]) == ("gang_lost", "sft", 3)
    assert "stage sft" in event["error"]
