"""The frozen model that the KL is measured from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from actors.store import Store
from actors.training_groups import fetch_group, frozen_log_probs
from rlhf.models.load import load_policy
from rlhf.models.settings import ModelConfig
from rlhf.types import GroupHandle


class ReferenceWorker:
    """Adds the reference's log-probs to groups; stateless, so a call may be repeated.

    Args:
        model: The frozen model's folder.
        store: Where rollouts live.
        dtype: What it computes in.
        threads: CPU threads; None leaves torch's default.
        max_tokens_per_batch: Most padded tokens of one forward pass.
        temperature: The sampler's; logits are divided by it.
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
        temperature: float = 1.0,
        device: str | None = None,
    ) -> None:
        self._config = ModelConfig(path=str(model), dtype=dtype)
        self._store = store
        self._threads = threads
        self._max_tokens = max_tokens_per_batch
        self._temperature = temperature
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model: nn.Module | None = None

    def start(self) -> None:
        """Loads the model."""
        if self._threads:
            torch.set_num_threads(self._threads)
        self._model = load_policy(self._config).eval().to(self._device)

    def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        """Returns the groups with ``reference_log_probs`` in their annotations."""
        assert self._model is not None, "start() comes first"
        found = frozen_log_probs(
            self._model,
            [fetch_group(handle, self._store) for handle in groups],
            max_tokens=self._max_tokens,
            temperature=self._temperature,
        )
        return [
            replace(handle, annotations={**handle.annotations, "reference_log_probs": self._store.put(values)})
            for handle, values in zip(groups, found, strict=True)
        ]

    def stop(self) -> None:
        """Drops the model."""
        self._model = None
