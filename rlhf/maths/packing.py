"""Rollout groups as rows of tokens: siblings share their prompt, and micro-batches are planned from lengths.

The siblings of one prompt differ only after it, so a row holds the prompt once and then every completion:

    row        P P P  a a a a  b b  .        P prompt, a and b siblings, . padding
    position   0 1 2  3 4 5 6  3 4  0        completions restart at the prompt's length
    segment    0 0 0  1 1 1 1  2 2 -1

A completion token attends to the prompt and to its own earlier tokens, so every log-probability equals that of the
sequence alone in a row, at K prompts less work. Legend: B rows, S tokens in a row, N sequences (the siblings of all
groups in order), T longest completion, G groups, D width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf.errors import ConfigError, DataError
from rlhf.types import TrainGroup

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RecordT = TypeVar("RecordT", bound="DataclassInstance")

PROMPT_SEGMENT = 0
PADDING_SEGMENT = -1


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch of whole groups.

    Attributes:
        input_ids: Rows of tokens, right-padded. int64 [B, S]
        position_ids: Place of each token in its own sequence; restarts at P for every sibling. int64 [B, S]
        segment_ids: 0 prompt, 1 to K siblings, -1 padding. int64 [B, S]
        target_ids: Completion tokens, right-padded. int64 [N, T]
        length_mask: True at real completion tokens. bool [N, T]
        mask: True at real completion tokens that are trained on. bool [N, T]
        row_index: The row that holds each sequence. int64 [N]
        gather_index: Position in the row whose output predicts target t: the last prompt token for t = 0, else
            completion token t - 1; 0 where there is no target. int64 [N, T]
        last_index: Position in the row of each sequence's last token: a score head reads there. int64 [N]
        group_index: The group of each sequence, 0 to G - 1. int64 [N]
        uids: The groups' uids. G strings
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    target_ids: Tensor
    length_mask: Tensor
    mask: Tensor
    row_index: Tensor
    gather_index: Tensor
    last_index: Tensor
    group_index: Tensor
    uids: tuple[str, ...]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.uids)

    @property
    def num_sequences(self) -> int:
        """N."""
        return int(self.target_ids.shape[0])

    @property
    def is_causal(self) -> bool:
        """True where every row holds one sequence: ``attention_mask=None`` then means the same and runs faster."""
        return int(self.segment_ids.max()) <= 1

    def attention_mask(self, dtype: torch.dtype = torch.bool) -> Tensor:
        """Who may attend to whom: the prompt causally, a sibling to the prompt and causally to itself.

        Padding attends to itself only, so that no row of the softmax is empty.

        A transformers model (5.19, ``masking_utils._preprocess_mask_arguments``) hands a 4D mask to its attention as it
        is. With ``attn_implementation="sdpa"`` it may be boolean or additive in the model's compute dtype; boolean
        masks are turned into additive ones in every layer, so the additive form is the cheaper one. ``"eager"`` adds
        the mask to the logits and so needs the additive form: a boolean one would be silently wrong there. Flash
        attention takes no 4D mask: pack with ``share_prefix=False`` and pass no mask.

        Args:
            dtype: ``torch.bool``, or the dtype that the model computes in.

        Returns:
            [B, 1, S, S]: for ``torch.bool`` True where a query (third axis) may attend to a key (fourth axis);
            for a floating dtype 0 there and the dtype's lowest finite number elsewhere.
        """
        query, key = self.segment_ids[:, :, None], self.segment_ids[:, None, :]
        places = torch.arange(self.segment_ids.shape[1], device=self.segment_ids.device)
        causal = places[None, :] <= places[:, None]
        allowed = causal & (query >= PROMPT_SEGMENT) & ((query == key) | (key == PROMPT_SEGMENT))
        allowed = (allowed | (places[None, :] == places[:, None])).unsqueeze(1)
        if dtype == torch.bool:
            return allowed
        additive = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return additive.masked_fill_(~allowed, torch.finfo(dtype).min)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the batch with every tensor on ``device``."""
        return move_tensors(self, device)

    def gather_targets(self, hidden: Tensor) -> Tensor:
        """Picks the outputs that predict real completion tokens, padding left out.

        Args:
            hidden: Per-token outputs of the model. [B, S, D] or [B, S]

        Returns:
            [M, D] or [M], M = real completion tokens, in the order of ``target_ids[length_mask]``.
        """
        rows = self.row_index[:, None].expand_as(self.gather_index)[self.length_mask]
        return hidden[rows, self.gather_index[self.length_mask]]

    def scatter_targets(self, values: Tensor) -> Tensor:
        """Puts one value per real completion token [M] back into [N, T], zero at padding; keeps gradients."""
        return values.new_zeros(self.length_mask.shape).masked_scatter(self.length_mask, values)

    def gather_last(self, hidden: Tensor) -> Tensor:
        """Picks the output at each sequence's last token: [B, S, D] or [B, S] -> [N, D] or [N]."""
        return hidden[self.row_index, self.last_index]


def move_tensors(record: RecordT, device: torch.device | str) -> RecordT:
    """Returns a copy of a dataclass with each of its fields that is a tensor on ``device``."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(record, **{name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)})


def pack(groups: Sequence[TrainGroup], *, pad_id: int, multiple_of: int = 1, share_prefix: bool = True) -> PackedBatch:
    """Lays groups out as rows.

    Args:
        groups: At least one group; prompts may not be empty, completions may.
        pad_id: Token that fills the tail of rows and of ``target_ids``.
        multiple_of: S is rounded up to a multiple of this.
        share_prefix: True: one row per group. False: one row per sequence, each with its own copy of the prompt, for
            attention kernels that take no mask.

    Raises:
        DataError: No groups, an empty prompt, no completions, or a loss mask of another length.
    """
    if not groups:
        raise DataError("pack", found="no groups", needed="at least one", action="Drop the empty micro-batch.")
    for group in groups:
        _check_group(group)
    rows: list[tuple[TrainGroup, tuple[int, ...]]] = []
    for group in groups:
        siblings = range(len(group.completion_ids))
        rows += [(group, tuple(siblings))] if share_prefix else [(group, (k,)) for k in siblings]
    length = max(len(g.prompt_ids) + sum(len(g.completion_ids[k]) for k in ks) for g, ks in rows)
    length = -(-length // multiple_of) * multiple_of
    num_sequences = sum(len(g.completion_ids) for g in groups)
    longest = max(1, max(len(ids) for g in groups for ids in g.completion_ids))
    writer = _RowWriter(len(rows), length, num_sequences, longest, pad_id)
    for row, (group, siblings_of_row) in enumerate(rows):
        writer.write(row, group, siblings_of_row)
    sizes = torch.tensor([len(g.completion_ids) for g in groups])
    return PackedBatch(
        **{name: torch.from_numpy(array) for name, array in writer.arrays.items()},
        group_index=torch.repeat_interleave(torch.arange(len(groups)), sizes),
        uids=tuple(g.uid for g in groups),
    )


def _check_group(group: TrainGroup) -> None:
    where = f"prompt {group.uid}"
    if len(group.prompt_ids) == 0:
        raise DataError(where, found="an empty prompt", needed="at least one token", action="Remove the prompt.")
    if not group.completion_ids:
        raise DataError(where, found="no completions", needed="at least one", action="Remove the group.")
    if group.loss_masks is not None:
        masks, wanted = [len(m) for m in group.loss_masks], [len(c) for c in group.completion_ids]
        if masks != wanted:
            raise DataError(where, found=f"loss masks {masks}", needed=f"lengths {wanted}", action="Mend the masks.")


class _RowWriter:
    """Fills the arrays of a ``PackedBatch`` row by row; sequences are numbered in the order of writing."""

    def __init__(self, num_rows: int, length: int, num_sequences: int, longest: int, pad_id: int) -> None:
        self.arrays: dict[str, NDArray[np.generic]] = {
            "input_ids": np.full((num_rows, length), pad_id, np.int64),
            "position_ids": np.zeros((num_rows, length), np.int64),
            "segment_ids": np.full((num_rows, length), PADDING_SEGMENT, np.int64),
            "target_ids": np.full((num_sequences, longest), pad_id, np.int64),
            "length_mask": np.zeros((num_sequences, longest), np.bool_),
            "mask": np.zeros((num_sequences, longest), np.bool_),
            "row_index": np.zeros(num_sequences, np.int64),
            "gather_index": np.zeros((num_sequences, longest), np.int64),
            "last_index": np.zeros(num_sequences, np.int64),
        }
        self._sequence = 0

    def write(self, row: int, group: TrainGroup, siblings: tuple[int, ...]) -> None:
        a, prompt = self.arrays, len(group.prompt_ids)
        a["input_ids"][row, :prompt] = group.prompt_ids
        if len(siblings) == 1:
            # Counting on through the padding keeps the row plainly causal for models that look for restarts.
            a["position_ids"][row] = np.arange(a["position_ids"].shape[1])
        a["position_ids"][row, :prompt] = np.arange(prompt)
        a["segment_ids"][row, :prompt] = PROMPT_SEGMENT
        start = prompt
        for segment, k in enumerate(siblings, 1):
            ids = group.completion_ids[k]
            end, n, num = start + len(ids), self._sequence, len(ids)
            a["input_ids"][row, start:end] = ids
            a["position_ids"][row, start:end] = prompt + np.arange(num)
            a["segment_ids"][row, start:end] = segment
            a["target_ids"][n, :num] = ids
            a["length_mask"][n, :num] = True
            a["mask"][n, :num] = True if group.loss_masks is None else group.loss_masks[k]
            a["row_index"][n] = row
            if num:
                a["gather_index"][n, :num] = np.arange(start - 1, end - 1)
                a["gather_index"][n, 0] = prompt - 1
            a["last_index"][n] = end - 1 if num else prompt - 1
            start = end
            self._sequence += 1


def pad_tokens(arrays: Sequence[Sequence[NDArray[np.float32]]], batch: PackedBatch) -> Tensor:
    """Pads per-token arrays of all groups to one tensor; the inverse of ``split_by_length``.

    Args:
        arrays: Per group, K arrays [T_k].
        batch: The batch of the same groups in the same order.

    Returns:
        float32 [N, T], zero at padding, on the batch's device.

    Raises:
        DataError: An array's length is not that of its completion.
    """
    flat = [array for group in arrays for array in group]
    found, needed = [len(array) for array in flat], batch.length_mask.sum(-1).tolist()
    if found != needed:
        uids = ", ".join(batch.uids[:4])
        raise DataError(f"prompts {uids}", found=f"lengths {found}", needed=f"{needed}", action="Annotate again.")
    values = torch.from_numpy(np.concatenate([np.asarray(array, np.float32) for array in flat]))
    return batch.scatter_targets(values.to(batch.mask.device))


def split_by_length(values: Tensor, batch: PackedBatch) -> list[tuple[NDArray[np.float32], ...]]:
    """Cuts padding off per-token values: [N, T] -> per group, K float32 arrays [T_k]."""
    host = values.detach().to("cpu", torch.float32).numpy()
    lengths = batch.length_mask.sum(-1).tolist()
    groups: list[list[NDArray[np.float32]]] = [[] for _ in batch.uids]
    for sequence, group in enumerate(batch.group_index.tolist()):
        groups[group].append(host[sequence, : lengths[sequence]].copy())
    return [tuple(arrays) for arrays in groups]


def split_by_group(scores: Tensor, batch: PackedBatch) -> list[list[float]]:
    """One number per sequence to one list per group: [N] -> per group, K numbers."""
    groups: list[list[float]] = [[] for _ in batch.uids]
    for group, score in zip(batch.group_index.tolist(), scores.tolist(), strict=True):
        groups[group].append(score)
    return groups


def deal(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deals groups out to ranks.

    Every rank gets the same number of groups (one more on some ranks where they do not divide), whatever their lengths,
    so that a batch which can be cut into mini-batches on one rank can be on all; loads differ by at most the longest
    group. The result depends on the arguments only.

    Args:
        lengths: Tokens of each group.
        num_ranks: Ranks of the gang.

    Returns:
        Per rank, indices into ``lengths``, ascending.

    Raises:
        ConfigError: Fewer groups than ranks.
    """
    if len(lengths) < num_ranks:
        raise ConfigError(
            "learner batch",
            found=f"{len(lengths)} groups for {num_ranks} learner ranks",
            needed="at least one group per rank",
            action="Raise the groups of a step or lower the number of learner ranks.",
        )
    order = _by_falling_length(lengths)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for start in range(0, len(order), num_ranks):
        lightest = sorted(range(num_ranks), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(lightest, order[start : start + num_ranks], strict=False):
            ranks[rank].append(index)
            loads[rank] += lengths[index]
    return [sorted(share) for share in ranks]


def plan_micro_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Cuts one rank's groups into micro-batches, by falling length, so that rows of one need little padding.

    Args:
        lengths: Tokens of each group's row.
        max_tokens: Bound on rows times longest row of a micro-batch; a longer group goes alone.

    Returns:
        Micro-batch -> indices into ``lengths``; none is empty. ``split_plan`` makes more of them where other ranks have
        more.
    """
    plan: list[list[int]] = []
    for index in _by_falling_length(lengths):  # so the first group of a micro-batch is its longest
        if plan and (len(plan[-1]) + 1) * lengths[plan[-1][0]] <= max_tokens:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def _by_falling_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def split_plan(plan: list[list[int]], wanted: int) -> list[list[int]]:
    """Halves the micro-batch with the most rows until there are ``wanted``; empty ones fill what cannot be split.

    Collectives inside the model need the same number on every rank: one with less to do takes part in those of an empty
    micro-batch.
    """
    plan = list(plan)
    while len(plan) < wanted:
        widest = max(range(len(plan)), key=lambda i: (len(plan[i]), -i))
        rows = plan[widest]
        if len(rows) < 2:
            return plan + [[] for _ in range(wanted - len(plan))]
        plan[widest : widest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return plan
