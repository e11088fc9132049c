"""The bars that a run has to meet, by name."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from rlhf.config import StrictModel
from rlhf.evaluation.bootstrap import Interval
from rlhf.evaluation.report_card import EvalSummary


class CriteriaConfig(StrictModel):
    """What the evaluation must show; ``passed`` of the summary has one entry per bar."""

    min_delta_follows_request: float = 0.15
    """Least rise of the share of completions that follow the request, by the independent scorer; the whole paired
    interval must lie above 0 as well."""
    min_delta_slice: float = 0.0
    """Least change of that share in every slice: 0 means that no slice falls."""
    min_win_rate: float = Field(default=0.60, ge=0.0, le=1.0)
    """Least win rate against the starting model by the judge's margin."""
    min_distinct_2_ratio: float = Field(default=0.8, ge=0.0)
    """Least distinct-2 after training over distinct-2 before."""
    min_length_ratio: float = Field(default=0.7, ge=0.0)
    """Least mean length after training over mean length before."""
    max_length_ratio: float = Field(default=1.4, ge=0.0)
    """Greatest mean length after training over mean length before."""
    min_on_topic_ratio: float = Field(default=0.9, ge=0.0)
    """Least on-topic rate after training over the rate before."""
    min_prompts: int = Field(default=128, ge=1)
    """Least number of held-out prompts."""
    min_completions_per_prompt: int = Field(default=2, ge=1)
    """Least number of completions per prompt and arm, on average."""
    max_peak_memory_gib: float = Field(default=16.0, gt=0.0)
    """Greatest memory of all processes together."""


def _ratio(after: Mapping[str, Interval], before: Mapping[str, Interval], name: str) -> float:
    """After over before of a metric's means; 0 where either is missing or the start is at 0, so that no bar passes."""
    if name not in after or name not in before or before[name].mean == 0.0:
        return 0.0
    return after[name].mean / before[name].mean


def check_criteria(evaluation: EvalSummary, peak_memory_gib: float, config: CriteriaConfig) -> dict[str, bool]:
    """Compares an evaluation with the bars.

    A measure that could not be had fails its bar: what was not shown was not reached.

    Returns:
        Each bar by name, and whether it was met.
    """
    after, before = evaluation.after, evaluation.before
    delta = evaluation.delta.get("follows_request")
    slices = [part.delta.get("follows_request") for part in evaluation.slices.values()]
    completions = min(evaluation.num_completions[arm] for arm in ("before", "after"))
    return {
        "follows_request_rises": delta is not None and delta.mean >= config.min_delta_follows_request,
        "follows_request_interval_above_zero": delta is not None and delta.low > 0.0,
        "no_slice_falls": bool(slices) and all(s is not None and s.mean >= config.min_delta_slice for s in slices),
        "win_rate": evaluation.win_rate is not None and evaluation.win_rate.mean >= config.min_win_rate,
        "distinct_2": _ratio(after, before, "distinct_2") >= config.min_distinct_2_ratio,
        "length": config.min_length_ratio <= _ratio(after, before, "length") <= config.max_length_ratio,
        "on_topic": _ratio(after, before, "on_topic") >= config.min_on_topic_ratio,
        "num_prompts": evaluation.num_prompts >= config.min_prompts
        and completions >= config.min_completions_per_prompt * evaluation.num_prompts,
        "peak_memory": peak_memory_gib <= config.max_peak_memory_gib,
    }
