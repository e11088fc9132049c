"""What each rank runs in the engine tests: a module of its own, so that spawned processes can import it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.multiprocessing as mp

from actors.ranks import ProcessGroup, RankInfo, free_port


def _entry(info: RankInfo, work: Callable[..., Any], args: tuple[Any, ...], queue: Any) -> None:
    os.environ["DS_ACCELERATOR"] = info.device
    torch.set_num_threads(1)
    try:
        group = ProcessGroup(info, timeout_s=60)  # DeepSpeed keeps to the first group of a process
        queue.put((info.rank, work(info, *args), None))
        group.close()
    except BaseException:
        queue.put((info.rank, None, traceback.format_exc()))


def run_ranks(
    world: int,
    work: Callable[..., Any],
    *args: Any,
    timeout_s: float = 240.0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> list[Any]:
    """Runs ``work(info, *args)`` in ``world`` fresh processes and returns their results in rank order."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    infos = [RankInfo(rank, world, master_port=port, threads=1, device=device) for rank in range(world)]
    processes = [context.Process(target=_entry, args=(info, work, args, queue), daemon=True) for info in infos]
    for process in processes:
        process.start()
    try:
        results: dict[int, Any] = {}
        for _ in range(world):
            rank, value, error = queue.get(timeout=timeout_s)
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = value
        return [results[rank] for rank in range(world)]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
