"""What the ranks of the Ray Train tests do: plain functions, so that its workers can import them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from rlhf.errors import DataError


def _arrive(folder: Path) -> tuple[int, int]:
    """This rank, and how many tries of it there have been, this one included."""
    rank = ray.train.get_context().get_world_rank()
    (folder / f"rank{rank}-{os.getpid()}").touch()
    return rank, len(list(folder.glob(f"rank{rank}-*")))


def lost_at_first_and_bad_data_then(config: dict[str, Any]) -> None:
    """Rank 1 loses its network on the first try, and then finds a fault that is there every time.

    Rank 0 waits for it in a collective.
    """
    rank, tries = _arrive(config["job"].run_dir)
    dist.barrier()
    if rank == 1 and tries == 1:
        raise ConnectionResetError("the other side went away")
    if rank == 1:
        raise DataError("groups:7", found="a broken row", needed="a whole one", action="Mend the row.")
    dist.barrier()
