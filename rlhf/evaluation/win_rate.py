"""Win rate of one model against another by a judge's margins."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from rlhf.errors import DataError
from rlhf.evaluation.bootstrap import BootstrapConfig, Interval, mean_interval


def win_rate(
    after: Mapping[str, Sequence[float]],
    before: Mapping[str, Sequence[float]],
    config: BootstrapConfig,
    *,
    tie_margin: float = 0.0,
    cluster_of: Mapping[str, Hashable] | None = None,
) -> Interval:
    """Share of comparisons won, a tie counting half.

    Within a prompt every completion of one model meets every completion of the other: the same expectation as one
    random pair with less spread.

    Args:
        after: Margins by prompt of the model in question; higher is better.
        before: Margins by prompt of the model that it is compared with.
        config: Resamples, confidence, seed.
        tie_margin: Margins that differ by no more than this are a tie.
        cluster_of: Which prompts are alike, for example by subject; None: each stands alone.

    Raises:
        DataError: No prompt has margins on both sides.
    """
    outcomes: list[float] = []
    clusters: list[Hashable] = []
    for uid, ours in after.items():
        for mine in ours:
            for theirs in before.get(uid, ()):
                gap = mine - theirs
                outcomes.append(0.5 if abs(gap) <= tie_margin else float(gap > 0))
                clusters.append(uid if cluster_of is None else cluster_of[uid])
    if not outcomes:
        needed, action = "prompts with margins on both sides", "Judge both models' completions of the same prompts."
        raise DataError("win rate", found="no pair", needed=needed, action=action)
    return mean_interval(outcomes, clusters, config)
