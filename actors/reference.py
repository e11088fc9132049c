"""The frozen model that the KL is measured from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from actors.frozen import FrozenWorker
from actors.health import observed
from actors.store import Store
from actors.training_groups import frozen_log_probs
from rlhf.models.load import load_policy
from rlhf.types import GroupHandle


class ReferenceWorker(FrozenWorker):
    """Adds the reference's log-probs to groups.

    Args:
        model: The frozen model's folder.
        store: Where rollouts live.
        temperature: The sampler's; logits are divided by it.
        **settings: See ``FrozenWorker``.
    """

    def __init__(self, model: Path, store: Store, *, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(model, store, **settings)
        self._temperature = temperature

    def _load(self) -> nn.Module:
        return load_policy(self._config)

    @observed
    def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        """Returns the groups with ``reference_log_probs`` in their annotations.

        Raises:
            RolloutsLostError: Groups went away with their node.
        """
        found = frozen_log_probs(
            self._model,
            self._fetch(groups),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            progress=self.progress,
        )
        return [
            replace(handle, annotations={**handle.annotations, "reference_log_probs": self._store.put(values)})
            for handle, values in zip(groups, found, strict=True)
        ]
