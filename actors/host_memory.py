"""Device memory on loan: tensors whose bytes wait in host memory while another role needs the device.

The bytes are moved below the tensors, storage by storage: every view, optimizer reference and hook stays as it is, and
nothing has to be known of who shares what. A tensor that is parked keeps its shape and must not be computed with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """What one part of a role has put aside.

    Args:
        device_type: Storages on other devices are left where they are.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._parked: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def park(self, tensors: Iterable[Tensor]) -> int:
        """Copies the tensors' bytes to host memory and gives their device memory back; returns the bytes.

        A storage that cannot be resized (mapped files, memory of another process) stays.
        """
        if self._device_type == "cuda":
            torch.cuda.synchronize()  # another stream may still be at work on them
        for tensor in tensors:
            if tensor.device.type != self._device_type:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():  # one that is parked already is empty
                copy = torch.UntypedStorage(storage.nbytes())
                copy.copy_(storage)
                storage.resize_(0)
                self._parked.append((storage, copy))
        if self._device_type == "cuda":
            torch.cuda.empty_cache()
        return sum(copy.nbytes() for _, copy in self._parked)

    def restore(self) -> None:
        """Puts every byte back; nothing happens where nothing is parked.

        A device that has no room for all of it (``torch.OutOfMemoryError``) leaves the rest parked.
        """
        while self._parked:
            storage, copy = self._parked[-1]
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
            self._parked.pop()


def module_tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what DeepSpeed keeps of a parameter that it has sharded (ZeRO-3)."""
    for parameter in module.parameters():
        yield parameter
        shard = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            yield shard
    yield from module.buffers()


def storage_id(tensor: Tensor) -> int:
    """Tells storages apart, empty ones too."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def tensors_within(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, dataclasses and optimizers (DeepSpeed's wrappers included)."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif one is value or isinstance(one, torch.optim.Optimizer):
            waiting += vars(one).values()
        elif dataclasses.is_dataclass(one) and not isinstance(one, type):
            waiting += [getattr(one, field.name) for field in dataclasses.fields(one)]
