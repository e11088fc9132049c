"""How well scores reproduce held-out rankings: pair accuracy and Kendall's tau, with intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import combinations

from rlhf.errors import DataError
from rlhf.evaluation.bootstrap import BootstrapConfig, Interval, mean_interval
from rlhf.maths.rank_correlation import kendall_tau_b

Scores = Sequence[float | None]
"""One per sibling, higher is better; None or NaN is missing. [K]"""
Ranks = Sequence[float | None]
"""One per sibling, lower is better; equal is a tie, None or NaN is no verdict. [K]"""


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def pair_outcomes(scores: Scores, ranks: Ranks) -> list[float]:
    """For each pair of siblings with different ranks: 1 if the scores order it alike, 0 if not, 0.5 if they are equal.

    Pairs that a side is missing are left out; so are ties of the ranking, which say nothing.
    """
    if len(scores) != len(ranks):
        raise ValueError(f"{len(scores)} scores for {len(ranks)} ranks")
    known = [(s, r) for s, r in zip(scores, ranks, strict=True) if not _is_missing(s) and not _is_missing(r)]
    outcomes = []
    for (score_a, rank_a), (score_b, rank_b) in combinations(known, 2):
        if rank_a == rank_b:
            continue
        first_is_better = rank_a < rank_b  # type: ignore[operator]
        gap = score_a - score_b  # type: ignore[operator]
        outcomes.append(0.5 if gap == 0 else float((gap > 0) == first_is_better))
    return outcomes


def pair_accuracy(
    scores: Sequence[Scores],
    ranks: Sequence[Ranks],
    config: BootstrapConfig,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Share of ranked pairs that the scores order alike, over all pairs of all prompts.

    The same function gives a judge's agreement with an independent scorer: pass the judge's values as scores and the
    ranks by the other scorer (``ranks_from_scores``).

    Args:
        scores: Per prompt, one score per sibling. [G][K]
        ranks: Per prompt, one rank per sibling. [G][K]
        config: Resamples, confidence, seed.
        clusters: Which prompts are alike, for example by subject; None: each stands alone. [G]

    Raises:
        DataError: No prompt has a pair with different ranks and both scores.
    """
    outcomes: list[float] = []
    drawn: list[Hashable] = []
    names = range(len(scores)) if clusters is None else clusters
    for name, group_scores, group_ranks in zip(names, scores, ranks, strict=True):
        pairs = pair_outcomes(group_scores, group_ranks)
        outcomes += pairs
        drawn += [name] * len(pairs)
    if not outcomes:
        raise _nothing_to_compare()
    return mean_interval(outcomes, drawn, config)


def ranks_from_scores(scores: Scores) -> tuple[int | None, ...]:
    """Ranks by descending score, 1 is best; equal scores share a rank, missing ones get None."""
    known = sorted({float(s) for s in scores if s is not None and not math.isnan(s)}, reverse=True)
    position = {value: rank for rank, value in enumerate(known, start=1)}
    return tuple(None if s is None or math.isnan(s) else position[float(s)] for s in scores)


def kendall_tau(
    scores: Sequence[Scores],
    ranks: Sequence[Ranks],
    config: BootstrapConfig,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean over prompts of Kendall's tau-b; prompts where it is undefined (a side all tied) are left out.

    The arguments are those of ``pair_accuracy``.

    Raises:
        DataError: It is undefined for every prompt.
    """
    # Of ranks lower is better: negated they point the same way as scores.
    better = [[None if rank is None else -rank for rank in group] for group in ranks]
    names = range(len(scores)) if clusters is None else clusters
    taus = [(kendall_tau_b(s, b), name) for s, b, name in zip(scores, better, names, strict=True)]
    defined = [(tau, name) for tau, name in taus if tau is not None]
    if not defined:
        raise _nothing_to_compare()
    return mean_interval([tau for tau, _ in defined], [name for _, name in defined], config)


def _nothing_to_compare() -> DataError:
    needed, action = "a prompt with two scored siblings of different ranks", "Hold out more rankings."
    return DataError("reward model evaluation", found="no comparable pair", needed=needed, action=action)
