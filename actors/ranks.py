"""One rank among others: where it stands, and the few collectives that a learner needs outside DeepSpeed."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.errors import LearnerError


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Where a rank stands in its gang.

    Attributes:
        rank: From 0.
        world_size: Ranks of the gang.
        master_address: Host of rank 0.
        master_port: Port there; 0 lets a gang of one choose, larger gangs are told by ``join``.
        threads: CPU threads of this rank; 0 takes every core of its node, None leaves torch's default.
        device: What the model runs on.
    """

    rank: int = 0
    world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 0
    threads: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


class ProcessGroup:
    """The gang's default process group: gloo on CPUs, NCCL on GPUs.

    A group that already exists (Ray Train makes one, with the same limit) is used as it is and left alone at the end.

    Args:
        info: This rank; a port is needed where there is more than one.
        timeout_s: Longest wait in one collective.
    """

    def __init__(self, info: RankInfo, *, timeout_s: float) -> None:
        self._owned = not dist.is_initialized()
        if self._owned:
            if info.world_size > 1 and info.master_port == 0:
                raise LearnerError(
                    f"learner rank {info.rank}",
                    found=f"no rendezvous for {info.world_size} ranks",
                    needed="address and port of rank 0",
                    action="Call join(address, port) before start().",
                )
            address = f"tcp://{info.master_address}:{info.master_port or free_port()}"
            dist.init_process_group(
                "nccl" if info.device == "cuda" else "gloo",
                init_method=address,
                rank=info.rank,
                world_size=info.world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        # DeepSpeed reads these even where the group exists.
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size))
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("MASTER_ADDR", info.master_address)
        os.environ.setdefault("MASTER_PORT", str(info.master_port or free_port()))

    def sum(self, value: Tensor) -> Tensor:
        """Adds a tensor over ranks; the argument is left alone."""
        result = value.detach().to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(result)
        return result.to(value.device)

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Adds numbers over ranks, element by element."""
        return [float(value) for value in self.sum(torch.tensor(values, dtype=torch.float64)).tolist()]

    def max_int(self, value: int) -> int:
        """The largest value of any rank."""
        result = torch.tensor([value], dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return int(result.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in rank order; plain data only."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def gather_names(self, names: Sequence[str]) -> list[str]:
        """Every rank's names in rank order."""
        return [name for part in self.gather(list(names)) for name in part]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank; plain data only."""
        if self.world_size == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the group where this object made it."""
        if self._owned and dist.is_initialized():
            dist.destroy_process_group()
