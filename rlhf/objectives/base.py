"""What an objective takes and gives: model outputs and signals in, a loss and additive metrics out.

A learner sums ``LossResult.loss`` over the micro-batches of all ranks. That sum is the objective's mean over the whole
step, because every loss is already divided by global counts (``Denominators``): splitting a step otherwise changes
nothing. Legend: N sequences, T longest completion, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import DataError
from rlhf.maths.ops import group_sum
from rlhf.maths.packing import PackedBatch, move_tensors, pad_tokens
from rlhf.maths.pairs import OrderedPairs, count_ordered_pairs
from rlhf.types import TrainGroup

Head = Literal["language_model", "scalar"]


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """What the learner's forward pass gives; only what the objective's head and needs call for is set.

    Attributes:
        log_probs: Log-probability of each target under the sampling temperature. float32 [N, T]
        entropy: Entropy of the distribution each target was drawn from, in nats. float32 [N, T]
        token_values: The critic's value of the state before each target (read at ``gather_index``). float32 [N, T]
        sequence_scores: The score head's output at each sequence's last token (``last_index``). float32 [N]
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    token_values: Tensor | None = None
    sequence_scores: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Denominators:
    """What one optimizer step trains on, counted over all ranks and micro-batches.

    Attributes:
        tokens: Trained completion tokens.
        sequences: Sequences with at least one trained token.
        groups: Groups with at least one such sequence.
    """

    tokens: float
    sequences: float
    groups: float

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(self.tokens + other.tokens, self.sequences + other.sequences, self.groups + other.groups)


@dataclass(frozen=True, slots=True)
class TokenSignals:
    """What a loss needs beside the model's outputs; None where there is no such signal.

    Attributes:
        advantages: float32 [N, T]
        returns: What the critic learns. float32 [N, T]
        old_log_probs: From the policy's weights at the start of the step; None where the step makes one update, for
            which they equal the current ones, and no critic reads them. float32 [N, T]
        behaviour_log_probs: From the generating engine. float32 [N, T]
        reference_log_probs: From the frozen reference. float32 [N, T]
        old_values: From the critic at the start of the step. float32 [N, T]
        ranks: Lower is better, NaN is missing; of a pair without ranks the first is better. float32 [N]
        scores: NaN is missing. float32 [N]
        mask: True at tokens whose loss counts: sequences without a usable score are all False. None means the batch's
            own mask. bool [N, T]
    """

    advantages: Tensor | None = None
    returns: Tensor | None = None
    old_log_probs: Tensor | None = None
    behaviour_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    old_values: Tensor | None = None
    ranks: Tensor | None = None
    scores: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def from_groups(cls, groups: Sequence[TrainGroup], batch: PackedBatch) -> TokenSignals:
        """Pads what the groups carry; a signal is set only where every group has it.

        Args:
            groups: The groups that ``batch`` was packed from, in order.
            batch: Gives shapes and device.
        """
        device = batch.mask.device

        def tokens(name: str) -> Tensor | None:
            arrays = [getattr(group, name) for group in groups]
            return None if any(a is None for a in arrays) else pad_tokens(arrays, batch)

        def sequences(rows: Sequence[tuple[float, ...] | None]) -> Tensor | None:
            known = [row for row in rows if row is not None]
            if len(known) < len(rows):
                return None
            return torch.tensor([value for row in known for value in row], dtype=torch.float32, device=device)

        return cls(
            behaviour_log_probs=tokens("behaviour_log_probs"),
            reference_log_probs=tokens("reference_log_probs"),
            old_log_probs=tokens("old_log_probs"),
            old_values=tokens("values"),
            ranks=sequences([ranks_of(group) for group in groups]),
            scores=sequences([group.scores for group in groups]),
        )

    def select(self, sequences: Tensor, num_tokens: int) -> TokenSignals:
        """Returns the signals of some sequences, cut to the first ``num_tokens`` tokens.

        Signals are made once for a whole step (whitening needs all of it) and then cut to micro-batches: pass the
        micro-batch's sequences in its own order and its T.

        Args:
            sequences: Indices into this object's N. int64 [N']
            num_tokens: T of the micro-batch.
        """
        cut: dict[str, Tensor | None] = {}
        for field in fields(self):
            value: Tensor | None = getattr(self, field.name)
            if value is not None:
                value = value[sequences] if value.ndim == 1 else value[sequences, :num_tokens]
            cut[field.name] = value
        return TokenSignals(**cut)

    def to(self, device: torch.device | str) -> TokenSignals:
        """Returns the signals with every tensor on ``device``."""
        return move_tensors(self, device)


def sequences_of_groups(batch: PackedBatch, groups: Sequence[int]) -> Tensor:
    """Indices of the sequences of some groups, group by group in the order given: what ``select`` takes. int64 [N']."""
    return torch.cat([(batch.group_index == group).nonzero()[:, 0] for group in groups])


Metrics = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class LossResult:
    """A micro-batch's share of the loss and of the metrics.

    Attributes:
        loss: Scalar with a graph; sums over micro-batches and ranks to the global mean.
        metrics: Name -> (total, count), detached scalars; both add over micro-batches and ranks, and total / count is
            the metric. A count of zero means that there is none.
    """

    loss: Tensor
    metrics: Metrics


class Objective(Protocol):
    """A loss as a pure function of tensors; stateless, so one object serves every rank and step.

    Attributes:
        head: Which output of the model it reads.
        needs_reference: Whether ``signals.reference_log_probs`` has to be there.
        needs_entropy: Whether ``outputs.entropy`` has to be there, with gradients.
    """

    head: Head
    needs_reference: bool
    needs_entropy: bool

    def count(self, groups: Sequence[TrainGroup]) -> Denominators:
        """This rank's share of the denominators: what is masked or misses its score or rank is left out."""
        ...

    def loss(
        self, outputs: ModelOutputs, batch: PackedBatch, signals: TokenSignals, denominators: Denominators
    ) -> LossResult:
        """The loss of one micro-batch, divided by the global denominators."""
        ...


def required(value: Tensor | None, name: str, where: str) -> Tensor:
    """Returns ``value``, or raises a ``DataError`` that names the signal and who needs it."""
    if value is None:
        action = "Annotate the groups with it, or have the forward pass compute it."
        raise DataError(where, found=f"no {name}", needed=name, action=action)
    return value


def trained_mask(batch: PackedBatch, signals: TokenSignals) -> Tensor:
    """Tokens whose loss counts: the batch's mask, less sequences without a usable score. bool [N, T]."""
    return batch.mask if signals.mask is None else batch.mask & signals.mask


def usable_scores(scores: Sequence[float], min_scores: int) -> list[bool]:
    """Which siblings of one group can be trained on: those with a score, if at least ``min_scores`` have one."""
    present = [not math.isnan(score) for score in scores]
    return present if sum(present) >= min_scores else [False] * len(present)


def usable_sequences(scores: Tensor, group_index: Tensor, min_scores: int) -> Tensor:
    """``usable_scores`` over a batch: scores [N], group_index [N] -> bool [N]."""
    present = ~torch.isnan(scores)
    counts = group_sum(present.long(), group_index, int(group_index.max()) + 1)
    return present & (counts >= min_scores)[group_index]


def count_trained(groups: Sequence[TrainGroup], usable: Sequence[Sequence[bool]]) -> Denominators:
    """Counts trained tokens, sequences and groups.

    Args:
        groups: This rank's groups.
        usable: Per group, which siblings are trained on.
    """
    tokens, sequences, num_groups = 0, 0, 0
    for group, wanted in zip(groups, usable, strict=True):
        lengths = [len(ids) for ids in group.completion_ids]
        if group.loss_masks is not None:
            lengths = [int(np.sum(mask)) for mask in group.loss_masks]
        trained = [length for length, use in zip(lengths, wanted, strict=True) if use and length]
        tokens, sequences, num_groups = tokens + sum(trained), sequences + len(trained), num_groups + bool(trained)
    return Denominators(float(tokens), float(sequences), float(num_groups))


def count_scored(groups: Sequence[TrainGroup], min_scores: int, user: str) -> Denominators:
    """Counts what has a usable score; a group without ``scores`` is an error, not a missing score."""
    for group in groups:
        if group.scores is None:
            raise DataError(
                f"objective {user}, prompt {group.uid}",
                found="no scores",
                needed="one per sibling (NaN where missing)",
                action="Score the group before the update.",
            )
    return count_trained(groups, [usable_scores(group.scores or (), min_scores) for group in groups])


def ranks_of(group: TrainGroup) -> tuple[float, ...] | None:
    """A group's ranks; a pair without ranks has its better completion first; None for other groups without ranks."""
    if group.ranks is None and len(group.completion_ids) == 2:
        return (1.0, 2.0)
    return group.ranks


def count_ranked(groups: Sequence[TrainGroup]) -> Denominators:
    """Counts ranked sequences of groups that have an ordered pair, and their trained tokens.

    An empty completion counts as a sequence: a score head reads the prompt's last token for it.

    Raises:
        DataError: A group without ranks that is not a pair.
    """
    usable = []
    for group in groups:
        ranks = ranks_of(group)
        if ranks is None:
            raise DataError(
                f"prompt {group.uid}",
                found=f"{len(group.completion_ids)} completions without ranks",
                needed="one rank per completion (NaN where missing), or a pair with the better one first",
                action="Rank the group before training.",
            )
        has_pair = count_ordered_pairs(ranks) > 0
        usable.append([has_pair and not math.isnan(rank) for rank in ranks])
    tokens = count_trained(groups, usable).tokens
    return Denominators(tokens, float(sum(map(sum, usable))), float(sum(map(any, usable))))


class RankedObjective:
    """What objectives over the ordered pairs of siblings share."""

    def count(self, groups: Sequence[TrainGroup]) -> Denominators:
        """Ranked sequences of groups that have an ordered pair."""
        return count_ranked(groups)


def pair_metrics(gaps: Tensor, pairs: OrderedPairs, *, scale: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs put the right way round, of which an even one is half a one, and the mean gap.

    Args:
        gaps: Better less worse. [M]
        pairs: The pairs.
        scale: Factor of the reported gap.
    """
    fixed, num_pairs = gaps.detach(), pairs.num_pairs.sum()
    right = (fixed > 0).to(fixed.dtype) + (fixed == 0).to(fixed.dtype) / 2
    return {"pair_accuracy": (right.sum(), num_pairs), "margin": (scale * fixed.sum(), num_pairs)}


def token_metric(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(total, count) of values over True places of the mask, detached."""
    return torch.where(mask, values.detach(), 0.0).sum(), mask.sum().to(values.dtype)


def step_metric(share: Tensor, mask: Tensor, denominators: Denominators) -> tuple[Tensor, Tensor]:
    """Metric of a value that is already divided by global counts: counts are shares of the step and add up to 1.

    Args:
        share: The micro-batch's share of the step's value. Scalar.
        mask: The micro-batch's trained tokens. bool [N, T]
        denominators: The step's counts.
    """
    return share.detach(), mask.sum().to(share.dtype) / max(denominators.tokens, 1.0)
