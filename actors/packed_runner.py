"""Runs a model in training without training it: log-probs, values, scores, and those of its reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from actors.deepspeed.engine import TrainEngine
from actors.host_memory import HostMemory, module_tensors
from actors.ranks import ProcessGroup
from actors.settings import LearnerConfig
from actors.training_groups import Progressed, TokenValues, frozen_log_probs, row_length
from rlhf.maths.packing import PackedBatch, pack, plan_micro_batches, split_by_group, split_by_length, split_plan
from rlhf.models.adapters import has_adapter, without_adapter
from rlhf.models.load import load_policy
from rlhf.types import TrainGroup

T = TypeVar("T")


class PackedRunner:
    """Forward passes on this rank's groups; every rank makes the same number of them, as collectives need.

    Args:
        engine: Holds the weights.
        model: The transformers or PEFT model inside it.
        group: The gang's process group.
        config: Model and limits.
        pad_id: Token that fills rows.
        temperature: The sampler's; logits are divided by it.
    """

    def __init__(
        self,
        engine: TrainEngine,
        model: nn.Module,
        group: ProcessGroup,
        config: LearnerConfig,
        *,
        pad_id: int,
        temperature: float,
    ) -> None:
        self._engine, self._model, self._group, self._config = engine, model, group, config
        self._pad_id = pad_id
        self._temperature = temperature
        self._frozen: nn.Module | None = None
        self._aside = HostMemory(group.device.type)
        self.progress: Progressed = lambda: None
        """Told of every batch of the frozen copy; whoever trains the model counts its passes himself."""

    def plan(self, groups: Sequence[TrainGroup]) -> list[list[int]]:
        """This rank's micro-batches; every rank gets the same number, empty ones at the end where it has too few."""
        lengths = [row_length(group) for group in groups]
        limit = self._config.max_tokens_per_micro_batch
        plan = plan_micro_batches(lengths, max_tokens=limit)
        wanted = self._group.max_int(len(plan))
        return split_plan(plan, wanted) if plan else [[] for _ in range(wanted)]

    def pack(self, groups: Sequence[TrainGroup]) -> PackedBatch:
        """Rows on the host; a rank without data gets one row of a single token, so that collectives meet."""
        return pack(groups or [_stand_in()], pad_id=self._pad_id)

    def log_probs(self, groups: Sequence[TrainGroup]) -> list[TokenValues]:
        """Under the current weights, in the groups' order."""
        return self._run(groups, {"temperature": self._temperature, "need_entropy": False}, split_by_length)

    def values(self, groups: Sequence[TrainGroup]) -> list[TokenValues]:
        """The critic's value of the state before each token, in the groups' order."""
        return self._run(groups, {"per_token": True}, split_by_length)

    def scores(self, groups: Sequence[TrainGroup]) -> list[list[float]]:
        """The reward model's score of each completion, in the groups' order."""
        return self._run(groups, {"per_token": False}, split_by_group)

    def _run(
        self, groups: Sequence[TrainGroup], options: dict[str, Any], split: Callable[[Tensor, PackedBatch], list[T]]
    ) -> list[T]:
        found: dict[int, T] = {}
        with self._engine.inference():
            for indices in self.plan(groups):
                batch = self.pack([groups[i] for i in indices])
                outputs = self._engine.forward(batch.to(self._group.device), options)
                (values,) = outputs.values()
                if indices:
                    found |= dict(zip(indices, split(values, batch), strict=True))
        return [found[i] for i in range(len(groups))]

    def reference_log_probs(self, groups: Sequence[TrainGroup]) -> list[TokenValues]:
        """Under the weights that training started from: the adapter switched off, or else a frozen copy."""
        if has_adapter(self._model):
            with without_adapter(self._model):
                return self.log_probs(groups)
        if self._frozen is None:
            plain = self._config.model.model_copy(update={"trainable": "all", "last_layers": 0})
            self._frozen = load_policy(plain).eval().requires_grad_(False).to(self._group.device)
        return frozen_log_probs(
            self._frozen,
            groups,
            max_tokens=self._config.max_tokens_per_micro_batch,
            temperature=self._temperature,
            progress=self.progress,
        )

    def reside(self, parts: Collection[str]) -> None:
        """Puts the frozen copy aside with the learner's state, which only an update needs, or brings it back."""
        if "state" in parts:
            self._aside.restore()
        elif self._frozen is not None:
            self._aside.park(module_tensors(self._frozen))


def _stand_in() -> TrainGroup:
    """What a rank without data runs, so that collectives inside the model meet."""
    return TrainGroup("", np.zeros(1, np.int32), (np.zeros(1, np.int32),), ranks=(1.0,), scores=(0.0,))
