"""Seeded percentile bootstrap intervals, clustered by subject or prompt.

Completions of one prompt are alike, and so are prompts on one subject, so subjects (prompts where they have none) are
drawn, not completions: in each resample every cluster has an integer weight from a multinomial, and a mean is the
weighted sum over the weighted count (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8, 13).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlhf.config import StrictModel
from rlhf.errors import DataError

Values = NDArray[np.float64]


class Interval(StrictModel):
    """An estimate and its confidence interval."""

    mean: float
    """The estimate on the data itself."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class BootstrapConfig(StrictModel):
    """How intervals are computed."""

    num_resamples: int = Field(default=2000, ge=100)
    """Resamples per interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Share of resamples inside the interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resampling; the same rows and seed give the same interval."""


def resampled_by(clusters: Sequence[str], items: Sequence[str]) -> list[str]:
    """What is to be resampled: each row's cluster, or its item where it is in none.

    Where all rows are in one cluster it is the items: one cluster alone would be drawn again and again, and its
    interval would claim that there is no spread.

    Args:
        clusters: For example subjects; empty where a row has none. [n]
        items: For example prompts' uids. [n]
    """
    names = [cluster or item for cluster, item in zip(clusters, items, strict=True)]
    return names if len(set(names)) > 1 else list(items)


def _cluster(values: Values, clusters: Sequence[Hashable], index: dict[Hashable, int]) -> tuple[Values, Values]:
    sums, counts = np.zeros(len(index)), np.zeros(len(index))
    positions = np.fromiter((index[cluster] for cluster in clusters), dtype=np.int64, count=len(clusters))
    np.add.at(sums, positions, values)
    np.add.at(counts, positions, 1.0)
    return sums, counts


def _index(*groups: Sequence[Hashable]) -> dict[Hashable, int]:
    return {cluster: i for i, cluster in enumerate(dict.fromkeys(c for group in groups for c in group))}


@functools.lru_cache(maxsize=3)  # a report asks for the same few sets of prompts over and over
def _draws(num_clusters: int, num_resamples: int, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_clusters, np.full(num_clusters, 1.0 / num_clusters), size=num_resamples)
    weights = draws.astype(np.float64)
    weights.flags.writeable = False
    return weights


def _weights(num_clusters: int, config: BootstrapConfig) -> Values:
    return _draws(num_clusters, config.num_resamples, config.seed)


def _interval(mean: float, resampled: Values, config: BootstrapConfig) -> Interval:
    finite = resampled[np.isfinite(resampled)]  # a resample without any value of a sparse metric says nothing
    tail = 100.0 * (1.0 - config.confidence) / 2.0
    low, high = np.percentile(finite, [tail, 100.0 - tail]) if finite.size else (mean, mean)
    return Interval(mean=mean, low=float(low), high=float(high))


def _ratio(numerators: Values, denominators: Values) -> Values:
    ratio = np.full(numerators.shape, np.nan)
    np.divide(numerators, denominators, out=ratio, where=denominators > 0)
    return ratio


def _checked(values: Sequence[float], clusters: Sequence[Hashable], what: str) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(clusters),):
        raise ValueError(f"{what}: {array.shape} values for {len(clusters)} clusters")
    if array.size == 0 or not np.isfinite(array).all():
        found = "no values" if array.size == 0 else "a value that is not finite"
        action = "Leave missing values out before averaging, and check that some are left."
        raise DataError(what, found=found, needed="at least one value, all finite", action=action)
    return array


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable], config: BootstrapConfig) -> Interval:
    """Mean over all values, resampled by cluster.

    Args:
        values: Finite numbers. [n]
        clusters: Whose value it is, usually the prompt's uid. [n]
        config: Resamples, confidence, seed.

    Raises:
        DataError: There is no value, or one that is not finite.
    """
    return ratio_interval(values, [1.0] * len(clusters), clusters, config)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable], config: BootstrapConfig
) -> Interval:
    """Sum of numerators over sum of denominators, resampled by cluster: for example tokens' KL over tokens.

    Args:
        numerators: Finite numbers. [n]
        denominators: Finite numbers of zero or more, not all zero. [n]
        clusters: Whose values they are. [n]
        config: Resamples, confidence, seed.
    """
    above, below = _checked(numerators, clusters, "numerators"), _checked(denominators, clusters, "denominators")
    if (below < 0).any() or below.sum() == 0:
        action = "Leave rows without a denominator out."
        raise DataError("denominators", found="none above 0", needed="weights of zero or more", action=action)
    index = _index(clusters)
    top, _ = _cluster(above, clusters, index)
    bottom, _ = _cluster(below, clusters, index)
    weights = _weights(len(index), config)
    return _interval(float(top.sum() / bottom.sum()), _ratio(weights @ top, weights @ bottom), config)


def paired_difference(
    after: tuple[Sequence[float], Sequence[Hashable]],
    before: tuple[Sequence[float], Sequence[Hashable]],
    config: BootstrapConfig,
) -> Interval:
    """Mean after minus mean before, both resampled with the same clusters.

    Prompts differ in difficulty more than models do, so drawing the same prompts on both sides takes that spread out.

    Args:
        after: Values and their clusters.
        before: Values and their clusters; only clusters on both sides count.
        config: Resamples, confidence, seed.

    Raises:
        DataError: No cluster is on both sides.
    """
    shared = set(after[1]) & set(before[1])
    sides = []
    for values, clusters in (after, before):
        pairs = [(v, c) for v, c in zip(values, clusters, strict=True) if c in shared]
        kept = [c for _, c in pairs]
        sides.append((_checked([v for v, _ in pairs], kept, "paired values"), kept))
    index = _index(sides[0][1])
    (sum_a, count_a), (sum_b, count_b) = (_cluster(values, clusters, index) for values, clusters in sides)
    weights = _weights(len(index), config)
    mean = float(sum_a.sum() / count_a.sum() - sum_b.sum() / count_b.sum())
    return _interval(
        mean, _ratio(weights @ sum_a, weights @ count_a) - _ratio(weights @ sum_b, weights @ count_b), config
    )


def jackknife_interval(estimate: float, left_out: Sequence[float], config: BootstrapConfig) -> Interval:
    """Normal interval of a statistic of a whole set from its leave-one-cluster-out values.

    For statistics such as distinct-n, where a bootstrap's repeated prompts would count as repetition of the model's
    (Efron and Tibshirani 1993, equation 11.5).

    Args:
        estimate: The statistic on all clusters.
        left_out: The statistic without cluster i. [n]
        config: Confidence; resamples and seed play no part.
    """
    from statistics import NormalDist

    values = np.asarray(left_out, dtype=np.float64)
    num = len(values)
    error = float(np.sqrt((num - 1) / num * np.square(values - values.mean()).sum())) if num > 1 else 0.0
    width = NormalDist().inv_cdf(0.5 + config.confidence / 2.0) * error
    return Interval(mean=estimate, low=estimate - width, high=estimate + width)
