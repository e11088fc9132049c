"""Training groups on disk: what feedback leaves for the reward model, and offline stages read in every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf.data.prompts import SUBJECT_COLUMN
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
            cluster=group.prompt.fields.get(SUBJECT_COLUMN, ""),
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
            ("cluster", pa.string()),
        ]
    )
    rows = [
        {
            "uid": group.uid,
            "prompt_ids": group.prompt_ids,
            "completion_ids": list(group.completion_ids),
            "ranks": group.ranks,
            "scores": group.scores,
            "cluster": group.cluster,
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
        cluster=row.get("cluster") or "",
    )


def split_held_out(
    groups: Sequence[TrainGroup], fraction: float, *, seed: int
) -> tuple[list[TrainGroup], list[TrainGroup]]:
    """Splits into (training, held out) and tears no cluster apart: what is held out is about other subjects.

    Clusters are taken in a random order as long as they fit into the share. At least one is held out if ``fraction``
    is above 0, and at least one is left for training. Where all groups are of one cluster, prompts are split instead.
    """
    names = [group.cluster or group.uid for group in groups]
    if len(set(names)) == 1:
        names = [f"{index}" for index in range(len(groups))]
    clusters: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        clusters.setdefault(name, []).append(index)
    shuffled = [list(clusters.values())[i] for i in np.random.default_rng(seed).permutation(len(clusters))]
    held_out = _fill(shuffled, max(round(fraction * len(groups)), 1)) if fraction > 0 and len(shuffled) > 1 else set()
    return (
        [group for index, group in enumerate(groups) if index not in held_out],
        [group for index, group in enumerate(groups) if index in held_out],
    )


def _fill(clusters: Sequence[Sequence[int]], room: int) -> set[int]:
    """Indices of the clusters that fit into ``room`` in their order: not all of them, and the smallest if none fits."""
    taken: list[Sequence[int]] = []
    for cluster in clusters:
        if len(cluster) <= room and len(taken) < len(clusters) - 1:
            taken.append(cluster)
            room -= len(cluster)
    return {index for cluster in taken or [min(clusters, key=len)] for index in cluster}


def best_completions(groups: Sequence[TrainGroup], *, min_score: float | None) -> list[TrainGroup]:
    """Rejection sampling: of each group the best-ranked completion, of several such the one with the highest score.

    People and pairwise judges rank without scores.

    Args:
        groups: With ranks.
        min_score: Least score of a completion that is learned from, where it has one; None takes them all.

    Returns:
        Groups of one completion; a prompt none of whose completions is good enough is left out.

    Raises:
        DataError: A group has no ranks.
    """
    chosen = []
    for group in groups:
        if group.ranks is None:
            raise DataError(
                f"prompt {group.uid}",
                found="no ranks",
                needed="a ranking of its completions",
                action="Use what the feedback stage left.",
            )
        ranks, scores = group.ranks, group.scores or (math.nan,) * len(group.ranks)
        known = [-math.inf if math.isnan(score) else score for score in scores]
        present = [k for k, rank in enumerate(ranks) if not math.isnan(rank)]
        if not present:
            continue
        best = min(present, key=lambda k: (ranks[k], -known[k], k))
        if min_score is None or math.isnan(scores[best]) or scores[best] >= min_score:
            ids = (group.completion_ids[best],)
            chosen.append(TrainGroup(group.uid, group.prompt_ids, ids, cluster=group.cluster))
    return chosen
