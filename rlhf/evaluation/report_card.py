"""From the completions of an evaluation to the ``eval`` part of the summary.

A pure function of plain rows and a seed: ``grade(from_wide(read_table(RUN/eval/completions.parquet)), config)`` gives
the numbers of ``summary.json`` again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.errors import DataError
from rlhf.evaluation.bootstrap import (
    BootstrapConfig,
    Interval,
    jackknife_interval,
    paired_difference,
    ratio_interval,
    resampled_by,
)
from rlhf.evaluation.completions import ARMS, EvalCompletion
from rlhf.evaluation.independent import IndependentScorerConfig, follows_request
from rlhf.evaluation.slices import by_slice, worst_slice
from rlhf.evaluation.text import distinct_n, distinct_n_left_out, on_topic, repetition, word_count
from rlhf.evaluation.win_rate import win_rate

Metrics = dict[str, Interval]
Clusters = Mapping[str, str]
"""What intervals resample, by prompt: its subject, or the prompt itself."""


class ReportCardConfig(StrictModel):
    """How the evaluation is summarised."""

    bootstrap: BootstrapConfig = BootstrapConfig()
    """Intervals."""
    independent: IndependentScorerConfig | None = IndependentScorerConfig()
    """Which sign of sentiment each request asks for; null: whether requests are followed is not measured."""
    tie_margin: float = Field(default=0.0, ge=0.0)
    """Judge margins that differ by no more than this are a tie in the win rate."""
    slice_field: str = "request"
    """Column of the prompts' data that names the slice; without it there are no slices."""
    subject_field: str = "subject"
    """Column that names what a completion has to be about; without it, whether it is on topic is not measured."""
    keywords_field: str = "keywords"
    """Column with stems that show that it is; without it the subject's own words count."""

    @property
    def request_signs(self) -> Mapping[str, int]:
        """Sign of sentiment by request; empty where following requests is not measured."""
        return {} if self.independent is None else self.independent.request_signs


class SliceSummary(StrictModel):
    """One slice of the held-out prompts."""

    num_prompts: int
    """Prompts in the slice."""
    before: Metrics
    """The starting model."""
    after: Metrics
    """The trained model."""
    best_of_n: Metrics
    """The starting model's best of n by the reward model; empty where it was not drawn."""
    delta: Metrics
    """After minus before, paired by prompt."""
    win_rate: Interval | None
    """Against the starting model; None without judge margins."""


class EvalSummary(StrictModel):
    """The evaluation before and after training."""

    num_prompts: int
    """Held-out prompts with completions before and after."""
    num_completions: dict[str, int]
    """Completions by arm."""
    before: Metrics
    """The starting model, by metric."""
    after: Metrics
    """The trained model, by metric."""
    best_of_n: Metrics
    """The starting model's best of n by the reward model; empty where it was not drawn."""
    delta: Metrics
    """After minus before, paired by prompt."""
    win_rate: Interval | None
    """Against the starting model by the judge's margin; None without margins."""
    slices: dict[str, SliceSummary]
    """The same by slice of the request; empty where the prompts name none."""
    worst_slice: str
    """Slice whose requests are followed least after training; empty where that was not measured."""
    missing: dict[str, int]
    """Measures that could not be had, as ``arm.measure``; they are left out of the means."""
    confidence: float = BootstrapConfig().confidence
    """Of all intervals here."""

    @property
    def told_confidence(self) -> str:
        """The confidence for a reader, for example ``95 %``."""
        return f"{100 * self.confidence:g} %"


Measure = Callable[[EvalCompletion], float | None]


def _measures(config: ReportCardConfig) -> dict[str, Measure]:
    signs = config.request_signs

    def follows(row: EvalCompletion) -> float | None:
        return float(follows_request(row.vader, row.request, signs)) if signs and row.vader is not None else None

    return {
        "follows_request": follows,
        "judge_margin": lambda row: row.judge_margin,
        "reward_model": lambda row: row.reward_model,
        "kl_per_token": lambda row: row.kl_per_token,
        "nll_start": lambda row: row.nll_start,
        "length": lambda row: float(row.num_tokens),
        "words": lambda row: float(word_count(row.text)),
        "finished": lambda row: float(row.finish_reason == "stop"),
        "repetition": lambda row: repetition(row.text),
        "on_topic": lambda row: float(on_topic(row.text, row.subject, row.keywords)) if row.subject else None,
    }


_PER_TOKEN = ("kl_per_token", "nll_start")
"""Averaged over tokens and not over completions."""


def grade(rows: Sequence[EvalCompletion], config: ReportCardConfig, *, unmeasured: Collection[str] = ()) -> EvalSummary:
    """Summarises an evaluation.

    Args:
        rows: Completions of all arms; ``before`` and ``after`` have the same prompts.
        config: Intervals, signs, ties.
        unmeasured: Measures that nobody asked for: they are empty and do not count as missing.

    Raises:
        DataError: An arm is missing, or the arms have different prompts.
    """
    arms = {arm: [row for row in rows if row.arm == arm] for arm in ARMS}
    uids = {arm: {row.uid for row in arms[arm]} for arm in ARMS}
    if not uids["before"] or uids["before"] != uids["after"] or not uids["best_of_n"] <= uids["before"]:
        found = ", ".join(f"{len(uids[arm])} prompts in {arm}" for arm in ARMS)
        needed, action = "the same prompts before and after", "Evaluate both models on one held-out split."
        raise DataError("evaluation", found=found, needed=needed, action=action)
    slices = {name: _slice(part, config) for name, part in by_slice(rows, lambda row: row.request).items() if name}
    whole = _slice(rows, config)
    follows = {name: part.after["follows_request"] for name, part in slices.items() if "follows_request" in part.after}
    return EvalSummary(
        num_prompts=whole.num_prompts,
        num_completions={arm: len(part) for arm, part in arms.items()},
        before=whole.before,
        after=whole.after,
        best_of_n=whole.best_of_n,
        delta=whole.delta,
        win_rate=whole.win_rate,
        slices=slices,
        worst_slice=worst_slice(follows) if follows else "",
        missing=_missing(arms, unmeasured),
        confidence=config.bootstrap.confidence,
    )


def _missing(arms: Mapping[str, Sequence[EvalCompletion]], unmeasured: Collection[str]) -> dict[str, int]:
    measures = {"vader", "judge_margin", "reward_model", "kl_per_token", "nll_start"} - set(unmeasured)
    counts = {
        f"{arm}.{name}": sum(getattr(row, name) is None for row in rows)
        for arm, rows in arms.items()
        for name in sorted(measures)
    }
    return {name: count for name, count in counts.items() if count}


def _slice(rows: Sequence[EvalCompletion], config: ReportCardConfig) -> SliceSummary:
    arms = {arm: [row for row in rows if row.arm == arm] for arm in ARMS}
    margins = {arm: _margins(arms[arm]) for arm in ("before", "after")}
    judged = margins["before"].keys() & margins["after"].keys()
    subjects = {row.uid: row.subject for row in rows}
    clusters = dict(zip(subjects, resampled_by(list(subjects.values()), list(subjects)), strict=True))
    return SliceSummary(
        num_prompts=len({row.uid for row in arms["before"]}),
        before=_metrics(arms["before"], config, clusters),
        after=_metrics(arms["after"], config, clusters),
        best_of_n=_metrics(arms["best_of_n"], config, clusters),
        delta=_deltas(arms["after"], arms["before"], config, clusters),
        win_rate=win_rate(
            margins["after"],
            margins["before"],
            config.bootstrap,
            tie_margin=config.tie_margin,
            cluster_of=clusters,
        )
        if judged
        else None,
    )


def _margins(rows: Sequence[EvalCompletion]) -> dict[str, list[float]]:
    margins: dict[str, list[float]] = {}
    for row in rows:
        if row.judge_margin is not None:
            margins.setdefault(row.uid, []).append(row.judge_margin)
    return margins


def _known(rows: Sequence[EvalCompletion], name: str, measure: Measure) -> tuple[list[float], list[float], list[str]]:
    """Values, weights and prompts of the rows where a measure could be had and weighs anything."""
    values, weights, uids = [], [], []
    for row in rows:
        value = measure(row)
        weight = float(row.num_tokens) if name in _PER_TOKEN else 1.0
        if value is not None and weight > 0:
            values.append(value)
            weights.append(weight)
            uids.append(row.uid)
    return values, weights, uids


def _metrics(rows: Sequence[EvalCompletion], config: ReportCardConfig, clusters: Clusters) -> Metrics:
    metrics: Metrics = {}
    for name, measure in _measures(config).items():
        values, weights, uids = _known(rows, name, measure)
        if values:
            weighted = [value * weight for value, weight in zip(values, weights, strict=True)]
            metrics[name] = ratio_interval(weighted, weights, [clusters[uid] for uid in uids], config.bootstrap)
    if rows:
        estimate, left_out = _distinct(rows, clusters)
        metrics["distinct_2"] = jackknife_interval(estimate, left_out, config.bootstrap)
    return metrics


def _deltas(
    after: Sequence[EvalCompletion], before: Sequence[EvalCompletion], config: ReportCardConfig, clusters: Clusters
) -> Metrics:
    deltas: Metrics = {}
    for name, measure in _measures(config).items():
        sides = []
        for rows in (after, before):
            values, _, uids = _known(rows, name, measure)
            sides.append((values, [clusters[uid] for uid in uids]))
        if name not in _PER_TOKEN and set(sides[0][1]) & set(sides[1][1]):
            deltas[name] = paired_difference(sides[0], sides[1], config.bootstrap)
    (estimate_a, left_a), (estimate_b, left_b) = _distinct(after, clusters), _distinct(before, clusters)
    differences = [a - b for a, b in zip(left_a, left_b, strict=True)]
    deltas["distinct_2"] = jackknife_interval(estimate_a - estimate_b, differences, config.bootstrap)
    return deltas


def _distinct(rows: Sequence[EvalCompletion], clusters: Clusters) -> tuple[float, list[float]]:
    """Distinct-2 over one completion per prompt, averaged over the samples, and its values without each cluster.

    A set of n texts is compared with sets of n texts only, so that two completions per prompt before training and one
    of best-of-n give comparable numbers.
    """
    prompts: dict[str, list[EvalCompletion]] = {}
    for row in rows:
        prompts.setdefault(row.uid, []).append(row)
    ordered = [sorted(prompts[uid], key=lambda row: row.sample) for uid in sorted(prompts)]
    num_slots = min(len(siblings) for siblings in ordered)
    sets = [[siblings[slot].text for siblings in ordered] for slot in range(num_slots)]
    names = [clusters[siblings[0].uid] for siblings in ordered]
    left_out = [distinct_n_left_out(texts, names) for texts in sets]
    estimate = sum(distinct_n(texts) for texts in sets) / num_slots
    return estimate, [sum(values) / num_slots for values in zip(*left_out, strict=True)]
