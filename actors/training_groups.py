"""Rollout groups out of the object store, in the form that a model's forward pass needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actors.store import Store, fetch_payload
from rlhf.errors import DataError
from rlhf.maths.packing import PackedBatch, pack, plan_micro_batches, split_by_group, split_by_length
from rlhf.models.forward import language_outputs, scalar_outputs
from rlhf.types import GroupHandle, TrainGroup

T = TypeVar("T")

Progressed = Callable[[], None]
"""Is told of every batch that is done."""

TokenValues = tuple[NDArray[np.float32], ...]
"""K float32 arrays [T_k]."""


def fetch_group(handle: GroupHandle, store: Store) -> TrainGroup:
    """Reads a group and its annotations; scores come from the handle, NaN where missing.

    Raises:
        ValueLostError: The group or one of its annotations went away with its node.
    """
    group = fetch_payload(handle, store)
    completions = [rollout.completion for rollout in group.rollouts]
    if handle.scores and len(handle.scores) != len(completions):
        raise DataError(
            f"prompt {handle.uid}",
            found=f"{len(handle.scores)} scores",
            needed=f"{len(completions)}, one per sibling",
            action="Score the group again.",
        )

    def annotation(name: str) -> TokenValues | None:
        return store.get(handle.annotations[name]) if name in handle.annotations else None

    return TrainGroup(
        uid=handle.uid,
        prompt_ids=np.asarray(group.prompt.token_ids, dtype=np.int32),
        completion_ids=tuple(completion.token_ids for completion in completions),
        scores=tuple(math.nan if s.value is None else s.value for s in handle.scores) if handle.scores else None,
        behaviour_log_probs=tuple(completion.log_probs for completion in completions),
        reference_log_probs=annotation("reference_log_probs"),
        old_log_probs=annotation("old_log_probs"),
        values=annotation("values"),
    )


def row_length(group: TrainGroup) -> int:
    """Tokens of the group's row: the prompt once, and every completion."""
    return len(group.prompt_ids) + sum(len(ids) for ids in group.completion_ids)


def batches(groups: Sequence[TrainGroup], max_tokens: int) -> Iterator[list[int]]:
    """Indices of groups that go through the model together, similar lengths side by side."""
    yield from plan_micro_batches([row_length(g) for g in groups], max_tokens=max_tokens)


def frozen_log_probs(
    model: nn.Module,
    groups: Sequence[TrainGroup],
    *,
    max_tokens: int,
    temperature: float,
    progress: Progressed = lambda: None,
) -> list[TokenValues]:
    """Log-probs of every completion under a model that does not train, in the groups' order."""

    def read(batch: PackedBatch) -> list[TokenValues]:
        log_probs = language_outputs(model, batch, temperature=temperature).log_probs
        assert log_probs is not None, "a language model gives them"
        return split_by_length(log_probs, batch)

    return _read_batches(model, groups, max_tokens, read, progress)


def frozen_scores(
    model: nn.Module, groups: Sequence[TrainGroup], *, max_tokens: int, progress: Progressed = lambda: None
) -> list[list[float]]:
    """Scores of every completion under a reward model, in the groups' order."""

    def read(batch: PackedBatch) -> list[list[float]]:
        scores = scalar_outputs(model, batch, per_token=False).sequence_scores
        assert scores is not None, "a scalar model gives them"
        return split_by_group(scores, batch)

    return _read_batches(model, groups, max_tokens, read, progress)


def _read_batches(
    model: nn.Module,
    groups: Sequence[TrainGroup],
    max_tokens: int,
    read: Callable[[PackedBatch], list[T]],
    progress: Progressed,
) -> list[T]:
    found: dict[int, T] = {}
    device = next(model.parameters()).device
    with torch.no_grad():
        for indices in batches(groups, max_tokens):
            batch = pack([groups[i] for i in indices], pad_id=0).to(device)
            found |= dict(zip(indices, read(batch), strict=True))
            progress()
    return [found[i] for i in range(len(groups))]
