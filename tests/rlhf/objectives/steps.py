"""A training step without a model: each sequence owns the outputs that a model would give for it.

``run_step`` deals groups to ranks and micro-batches as a learner does and adds up losses, metrics and gradients, so
that tests can ask whether the way of dealing matters.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms.base import Algorithm
from rlhf.maths.packing import PackedBatch, pack
from rlhf.objectives.base import Denominators, ModelOutputs, Objective, TokenSignals, sequences_of_groups
from rlhf.types import TrainGroup

NAN = math.nan


def make_groups(seed: int = 0, num_groups: int = 5, siblings: int = 4) -> list[TrainGroup]:
    """Groups with everything set: ties and a missing score and rank in some, a loss mask in one, one all missing."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        lengths = rng.integers(1, 9, siblings)

        def arrays(lengths=lengths) -> tuple[np.ndarray, ...]:
            return tuple(rng.normal(-1, 0.3, n).astype(np.float32) for n in lengths)

        group = TrainGroup(
            f"p{g}",
            rng.integers(1, 99, rng.integers(1, 6)).astype(np.int32),
            tuple(rng.integers(1, 99, n).astype(np.int32) for n in lengths),
            ranks=tuple(float(r) for r in rng.integers(1, 4, siblings)),
            scores=tuple(float(s) for s in rng.normal(0, 1, siblings)),
            behaviour_log_probs=arrays(),
            reference_log_probs=arrays(),
            values=arrays(),
        )
        groups.append(group)
    groups[0] = replace(groups[0], loss_masks=tuple(np.arange(len(c)) % 2 == 0 for c in groups[0].completion_ids))
    missing = (NAN,) + groups[1].scores[1:]
    groups[1] = replace(groups[1], scores=missing, ranks=(NAN,) + groups[1].ranks[1:])
    groups[2] = replace(groups[2], scores=(1.0,) + (NAN,) * (siblings - 1), ranks=(2.0,) * siblings)
    return groups


@dataclass
class Leaves:
    """Outputs of an imagined model, per sequence, as leaves of the graph."""

    per_token: dict[tuple[str, int], dict[str, Tensor]]
    scores: dict[tuple[str, int], Tensor]

    @classmethod
    def of(cls, groups: Sequence[TrainGroup], seed: int = 7) -> Leaves:
        generator = torch.Generator().manual_seed(seed)
        per_token, scores = {}, {}
        for group in groups:
            for k, ids in enumerate(group.completion_ids):
                tensors = {
                    name: (torch.randn(len(ids), generator=generator) * 0.3 + shift).requires_grad_()
                    for name, shift in (("log_probs", -1.0), ("entropy", 1.0), ("token_values", 0.0), ("old", -1.0))
                }
                per_token[group.uid, k] = tensors
                scores[group.uid, k] = torch.randn((), generator=generator).requires_grad_()
        return cls(per_token, scores)

    def padded(self, name: str, groups: Sequence[TrainGroup], batch: PackedBatch) -> Tensor:
        keys = [(g.uid, k) for g in groups for k in range(len(g.completion_ids))]
        return batch.scatter_targets(torch.cat([self.per_token[key][name] for key in keys]))

    def outputs(self, groups: Sequence[TrainGroup], batch: PackedBatch, scale: float = 1.0) -> ModelOutputs:
        keys = [(g.uid, k) for g in groups for k in range(len(g.completion_ids))]
        padded = {n: self.padded(n, groups, batch) * scale for n in ("log_probs", "entropy", "token_values")}
        return ModelOutputs(sequence_scores=torch.stack([self.scores[key] for key in keys]), **padded)

    def gradients(self) -> dict[str, Tensor]:
        found = {f"{uid}/{k}/score": leaf.grad for (uid, k), leaf in self.scores.items()}
        for (uid, k), tensors in self.per_token.items():
            found |= {f"{uid}/{k}/{name}": leaf.grad for name, leaf in tensors.items()}
        return {key: grad for key, grad in found.items() if grad is not None}


class ThreadSum:
    """A sum over ranks that run as threads."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=20)
        self._parts: dict[int, Tensor] = {}

    def of_rank(self, rank: int):
        def reduce_sum(value: Tensor) -> Tensor:
            self._parts[rank] = value
            self._barrier.wait()
            total = torch.stack([self._parts[r] for r in sorted(self._parts)]).sum(0)
            self._barrier.wait()
            return total

        return reduce_sum


@dataclass
class StepResult:
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def run_step(
    objective: Objective,
    groups: Sequence[TrainGroup],
    plan: Sequence[Sequence[Sequence[int]]],
    algorithm: Algorithm | None = None,
    *,
    multiple_of: int = 1,
) -> StepResult:
    """One optimizer step: rank -> micro-batch -> indices of groups; returns what all ranks add up to."""
    leaves = Leaves.of(sorted(groups, key=lambda g: g.uid))
    counts = Denominators(0.0, 0.0, 0.0)
    for rank in plan:
        counts += objective.count([groups[i] for rows in rank for i in rows])
    total, metrics = torch.zeros(()), {}
    for mine, signals, batch in _signals_of_ranks(groups, plan, leaves, algorithm):
        for rows in mine:
            chosen = [groups[i] for i in rows]
            micro = pack(chosen, pad_id=0, multiple_of=multiple_of)
            order = [batch.uids.index(g.uid) for g in chosen]
            cut = signals.select(sequences_of_groups(batch, order), micro.mask.shape[1])
            result = objective.loss(leaves.outputs(chosen, micro), micro, cut, counts)
            total = total + result.loss
            for name, (amount, count) in result.metrics.items():
                before = metrics.get(name, (0.0, 0.0))
                metrics[name] = (before[0] + float(amount), before[1] + float(count))
    total.backward()
    reduced = {name: amount / count for name, (amount, count) in metrics.items() if count}
    return StepResult(float(total.detach()), reduced, leaves.gradients())


def _signals_of_ranks(groups, plan, leaves, algorithm):
    reducer, found = ThreadSum(len(plan)), {}

    def rank_signals(rank: int) -> None:
        mine = [groups[i] for rows in plan[rank] for i in rows]
        batch = pack(mine, pad_id=0)
        raw = replace(TokenSignals.from_groups(mine, batch), old_log_probs=leaves.padded("old", mine, batch).detach())
        found[rank] = (algorithm.signals(batch, raw, reducer.of_rank(rank)) if algorithm else raw, batch)

    threads = [threading.Thread(target=rank_signals, args=(rank,)) for rank in range(len(plan))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(plan[rank], *found[rank]) for rank in range(len(plan))]
