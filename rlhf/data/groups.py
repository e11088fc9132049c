"""Training groups on disk: what feedback leaves for the reward model, and offline stages read in every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf.errors import DataError
from rlhf.runs.tables import read_table, write_table
from rlhf.types import Ranking, RolloutGroup, TrainGroup


def groups_from_feedback(
    groups: Sequence[RolloutGroup], rankings: Sequence[Ranking], scores: Sequence[Sequence[float | None]]
) -> list[TrainGroup]:
    """Joins siblings with their ranking and their judge scores; what is missing becomes NaN.

    Args:
        groups: K siblings each.
        rankings: Of the same prompts, in the same order.
        scores: Per group, one number per sibling, such as the judge's margin. [K]
    """
    return [
        TrainGroup(
            uid=group.prompt.uid,
            prompt_ids=np.asarray(group.prompt.token_ids, np.int32),
            completion_ids=tuple(rollout.completion.token_ids for rollout in group.rollouts),
            ranks=tuple(float("nan") if rank is None else float(rank) for rank in ranking.ranks),
            scores=tuple(float("nan") if score is None else float(score) for score in row),
        )
        for group, ranking, row in zip(groups, rankings, scores, strict=True)
    ]


def write_groups(path: Path, groups: Sequence[TrainGroup]) -> None:
    """Writes groups as parquet, whole or not at all."""
    schema = pa.schema(
        [
            ("uid", pa.string()),
            ("prompt_ids", pa.list_(pa.int32())),
            ("completion_ids", pa.list_(pa.list_(pa.int32()))),
            ("ranks", pa.list_(pa.float32())),
            ("scores", pa.list_(pa.float32())),
        ]
    )
    rows = [
        {
            "uid": group.uid,
            "prompt_ids": group.prompt_ids,
            "completion_ids": list(group.completion_ids),
            "ranks": group.ranks,
            "scores": group.scores,
        }
        for group in groups
    ]
    write_table(path, rows, schema)


def read_groups(paths: Iterable[Path]) -> list[TrainGroup]:
    """Reads what ``write_groups`` wrote, file after file; raises ``RecordError`` where one is missing or broken."""
    return [_group(row) for path in paths for row in read_table(path)]


def _group(row: Mapping[str, Any]) -> TrainGroup:
    return TrainGroup(
        uid=row["uid"],
        prompt_ids=np.asarray(row["prompt_ids"], np.int32),
        completion_ids=tuple(np.asarray(ids, np.int32) for ids in row["completion_ids"]),
        ranks=None if row["ranks"] is None else tuple(row["ranks"]),
        scores=None if row["scores"] is None else tuple(row["scores"]),
    )


def split_held_out(
    groups: Sequence[TrainGroup], fraction: float, *, seed: int
) -> tuple[list[TrainGroup], list[TrainGroup]]:
    """Splits by prompt into (training, held out); at least one group is held out if ``fraction`` is above 0."""
    order = np.random.default_rng(seed).permutation(len(groups))
    num_held_out = min(max(round(fraction * len(groups)), 1), len(groups) - 1) if fraction > 0 else 0
    held_out = set(order[:num_held_out].tolist())
    return (
        [group for index, group in enumerate(groups) if index not in held_out],
        [group for index, group in enumerate(groups) if index in held_out],
    )


def best_completions(groups: Sequence[TrainGroup], *, min_score: float) -> list[TrainGroup]:
    """Rejection sampling: of each group the best-ranked completion, if its score is at least ``min_score``.

    Returns:
        Groups of one completion; a prompt none of whose completions is good enough is left out.
    """
    chosen = []
    for group in groups:
        if group.ranks is None or group.scores is None:
            raise DataError(
                f"prompt {group.uid}", found="no ranks or scores", needed="both", action="Use a judge's feedback."
            )
        present = [k for k, rank in enumerate(group.ranks) if rank == rank]
        if not present:
            continue
        ranks, scores = group.ranks, group.scores
        best = min(present, key=lambda k: (ranks[k], -scores[k], k))
        if scores[best] >= min_score:
            chosen.append(TrainGroup(group.uid, group.prompt_ids, (group.completion_ids[best],)))
    return chosen
