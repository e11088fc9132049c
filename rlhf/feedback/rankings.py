"""Verdicts, outcomes and ratings to rankings of the K siblings of one prompt.

A sibling without a verdict has no rank (None); it takes part in no pair of the rank loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, FiniteFloat

from rlhf.config import StrictModel
from rlhf.feedback.verdicts import Disagreement, PairOutcome, pair_outcomes
from rlhf.types import Ranking, Verdict


class RankingConfig(StrictModel):
    """How verdicts become rankings."""

    tie_width: FiniteFloat = Field(default=0.0, ge=0.0)
    """Margins (nats) or ratings that lie within this width share a rank."""
    disagreement: Disagreement = "tie"
    """What two orders of a pairwise judge that name different winners amount to: ``tie`` or ``none``."""


def ranking_from_scores(
    uid: str, scores: Sequence[float | None], *, tie_width: float = 0.0, source: str = "judge"
) -> Ranking:
    """Ranks siblings by a score, higher is better.

    A rank holds every score within ``tie_width`` of its best one, so a rank is never wider than that however many
    scores follow each other closely.

    Args:
        uid: The prompt's uid.
        scores: None (or NaN) is missing. [K]
        tie_width: Scores this close to a rank's best share it.
        source: Who ranked.
    """
    known = [(float(score), index) for index, score in enumerate(scores) if score is not None and not math.isnan(score)]
    ranks: list[int | None] = [None] * len(scores)
    rank, best = 0, math.inf
    for score, index in sorted(known, key=lambda item: -item[0]):
        if rank == 0 or best - score > tie_width:
            rank, best = rank + 1, score
        ranks[index] = rank
    return Ranking(uid, tuple(ranks), source)


def ranking_from_outcomes(uid: str, num_samples: int, outcomes: Sequence[PairOutcome], *, source: str) -> Ranking:
    """Ranks siblings by their Copeland score (wins plus half of the ties), as a share of the pairs with an outcome.

    The share, not the sum, is compared: a sibling with a missing outcome is not thereby worse. A sibling without any
    outcome has no rank. On outcomes of single pairs a Borda count gives the same order.

    Args:
        uid: The prompt's uid.
        num_samples: K.
        outcomes: At most one per pair.
        source: Who judged.
    """
    points, counts = [0.0] * num_samples, [0] * num_samples
    for outcome in outcomes:
        if outcome.value is None:
            continue
        for sample, value in zip(outcome.samples, (outcome.value, 1.0 - outcome.value), strict=True):
            points[sample] += value
            counts[sample] += 1
    shares = [total / count if count else None for total, count in zip(points, counts, strict=True)]
    # Shares of different counts that are equal on paper may differ in the last bit.
    return ranking_from_scores(uid, shares, tie_width=1e-9, source=source)


def ranking_from_verdicts(
    uid: str, num_samples: int, verdicts: Sequence[Verdict], config: RankingConfig, *, source: str = "judge"
) -> Ranking:
    """Ranks siblings from one judge's verdicts, pointwise or pairwise.

    Raises:
        ValueError: The verdicts are of both kinds, or about another prompt.
    """
    if any(verdict.uid != uid for verdict in verdicts):
        raise ValueError(f"verdicts about another prompt than {uid}")
    sizes = {len(verdict.samples) for verdict in verdicts}
    if sizes == {2}:
        outcomes = pair_outcomes(verdicts, disagreement=config.disagreement)
        return ranking_from_outcomes(uid, num_samples, outcomes, source=source)
    if sizes - {1}:
        raise ValueError(f"verdicts on {sorted(sizes)} siblings at once for prompt {uid}")
    scores: list[float | None] = [None] * num_samples
    for verdict in verdicts:
        scores[verdict.samples[0]] = verdict.value
    return ranking_from_scores(uid, scores, tie_width=config.tie_width, source=source)


def ranks_as_floats(ranking: Ranking) -> tuple[float, ...]:
    """Returns the ranks as ``TrainGroup.ranks`` holds them: NaN for None, shape [K]."""
    return tuple(math.nan if rank is None else float(rank) for rank in ranking.ranks)


def num_ordered_pairs(ranking: Ranking) -> int:
    """Returns how many pairs the ranking orders: what the rank loss learns from; 0 means nothing to learn."""
    known = [rank for rank in ranking.ranks if rank is not None]
    return sum(first != second for i, first in enumerate(known) for second in known[i + 1 :])
