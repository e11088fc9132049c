"""What workers around a model that does not train have in common: loading it, and reading groups for it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from actors.health import ProbedThread
from actors.host_memory import HostMemory, module_tensors
from actors.store import Store, fetch_all
from actors.training_groups import fetch_group
from rlhf.models.settings import ModelConfig
from rlhf.types import GroupHandle, TrainGroup


class FrozenWorker(ProbedThread, ABC):
    """Holds one model for inference in plain torch; stateless, so a call may be repeated.

    Args:
        model: The model's folder.
        store: Where rollouts live.
        dtype: What it computes in.
        threads: CPU threads; None takes every core of its node, where the environment says how many the driver's has,
            and leaves torch's default elsewhere.
        max_tokens_per_batch: Most padded tokens of one forward pass.
        device: Where it runs; None takes a GPU where this process has one.
    """

    def __init__(
        self,
        model: Path,
        store: Store,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int | None = None,
        max_tokens_per_batch: int = 8192,
        device: str | None = None,
    ) -> None:
        self._folder = Path(model)
        self._config = ModelConfig(path=str(model), dtype=dtype)
        self._store = store
        self._threads = threads
        self._max_tokens = max_tokens_per_batch
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: nn.Module | None = None
        self._aside = HostMemory(torch.device(self._device).type)

    def start(self) -> None:
        """Loads the model and what belongs to it; a second call returns at once."""
        if self._loaded is not None:
            return
        cores = os.cpu_count() or 1
        if self._threads:
            torch.set_num_threads(self._threads)
        elif os.environ.get("OMP_NUM_THREADS", str(cores)) != str(cores):  # else torch has taken them by itself
            torch.set_num_threads(cores)
        self._loaded = self._load().eval().to(self._device)

    @abstractmethod
    def _load(self) -> nn.Module:
        """Reads the model from its folder."""

    @property
    def _model(self) -> nn.Module:
        assert self._loaded is not None, "start() comes first"
        return self._loaded

    def _fetch(self, handles: Sequence[GroupHandle]) -> list[TrainGroup]:
        """Reads groups; raises ``RolloutsLostError`` where some are gone."""
        return fetch_all(handles, self._store, fetch_group, where=f"model {self._folder}")

    def reside(self, parts: Sequence[str]) -> None:
        """Keeps the model in device memory if ``weights`` are asked for, else in host memory."""
        if "weights" in parts:
            self._aside.restore()
        else:
            self._aside.park(module_tensors(self._model))

    def stop(self) -> None:
        """Drops the model."""
        self._loaded = None
