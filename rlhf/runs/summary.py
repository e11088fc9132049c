"""``summary.json``: the results of a run in one small file, and the same as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlhf.config import StrictModel, validate
from rlhf.evaluation.bootstrap import Interval
from rlhf.evaluation.report_card import EvalSummary
from rlhf.runs.files import read_json, write_json
from rlhf.runs.names import NOT_STAGES

DISPLAY = (
    ("follows_request", "follows the request"),
    ("judge_margin", "judge's margin"),
    ("reward_model", "reward model"),
    ("kl_per_token", "KL per token (nats)"),
    ("nll_start", "NLL under the start (nats)"),
    ("length", "length (tokens)"),
    ("distinct_2", "distinct-2"),
    ("repetition", "repetition"),
    ("on_topic", "on topic"),
    ("finished", "finished by itself"),
)
"""Metrics in the order in which tables show them, with their names for readers."""


class FeedbackSummary(StrictModel):
    """The feedback stage."""

    source: Literal["judge", "people"]
    """Whose verdicts the rankings are."""
    num_rankings: int = Field(ge=0)
    """Prompts with a ranking."""
    num_verdicts: int = Field(default=0, ge=0)
    """Verdicts asked for."""
    missing_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of verdicts that could not be had."""
    judge_agreement: Interval | None = None
    """Share of ranked pairs that the independent scorer orders as the judge did; None if not measured."""


class RewardModelSummary(StrictModel):
    """The reward model on held-out rankings."""

    pair_accuracy: Interval | None
    """Share of ranked pairs that it orders alike; None where no such pair was held out."""
    kendall_tau: Interval | None
    """Mean Kendall tau-b over prompts; None where it is undefined for all of them."""
    num_pairs: int = Field(ge=0)
    """Ranked pairs held out."""
    judge_agreement: Interval | None = None
    """Share of those pairs that the independent scorer orders as the judge ranked them; None if not measured."""

    def in_words(self) -> str:
        """One line for a reader."""
        accuracy, tau = self.pair_accuracy or "unknown", self.kendall_tau or "unknown"
        return f"reward model: pair accuracy {accuracy}, Kendall tau {tau}"


class Summary(StrictModel):
    """Everything in ``summary.json``."""

    recipe: str
    """Name of the config that ran."""
    seed: int
    """Seed of the run."""
    eval: EvalSummary | None = None
    """Evaluation before and after; None where the config has none."""
    feedback: FeedbackSummary | None = None
    """None where no feedback was gathered."""
    reward_model: RewardModelSummary | None = None
    """None where no reward model was trained."""
    timings: dict[str, dict[str, float]]
    """Seconds by stage and phase; ``total`` is the stage's own time, with the records and waits between its phases."""
    throughput: dict[str, float]
    """Tokens per second by role: drawn by generation, read by the judge and the models, trained on by learners, each
    epoch anew."""
    peak_memory_gib: float = Field(ge=0.0)
    """Highest PSS of all processes of the run on the driver's machine."""
    versions: dict[str, str]
    """Packages."""
    passed: dict[str, bool]
    """Each criterion by name."""
    notes: list[str] = []
    """What a reader must know of these numbers, for example that the judge shares the policy's starting weights."""


def write_summary(path: Path, summary: Summary) -> None:
    """Writes the file atomically; a number that is not finite is refused."""
    write_json(path, summary.model_dump(mode="json"))


def read_summary(path: Path) -> Summary:
    """Reads the file back; raises ``RecordError`` or ``ConfigError`` where it is broken."""
    document: Mapping[str, Any] = read_json(path)
    return validate(Summary, document, str(path))


def total_seconds(timings: Mapping[str, Mapping[str, float]]) -> float:
    """Seconds over all stages: a stage's ``total`` where it has one, the sum of its phases otherwise.

    What stands beside the stages (``rlhf.runs.names.NOT_STAGES``) passed inside of them and is in their totals.
    """
    stages = [phases for name, phases in timings.items() if name not in NOT_STAGES]
    return sum(phases["total"] if "total" in phases else sum(phases.values()) for phases in stages)


def format_summary(summary: Summary) -> str:
    """The results as plain text for a terminal, at most 100 columns wide."""
    lines: list[str] = []
    if summary.eval is not None:
        lines += _evaluation_lines(summary.eval)
    if summary.reward_model is not None:
        lines += ["", summary.reward_model.in_words()]
        if summary.reward_model.judge_agreement is not None:
            lines.append(f"judge with the independent scorer on the same pairs: {summary.reward_model.judge_agreement}")
    if summary.feedback is not None and summary.feedback.judge_agreement is not None:
        lines.append(f"judge's agreement with the independent scorer: {summary.feedback.judge_agreement}")
    seconds = total_seconds(summary.timings)
    lines += ["", f"time {seconds / 60:.1f} min, peak memory {summary.peak_memory_gib:.1f} GiB"]
    if summary.passed:
        lines += ["", "criteria:"] + [
            f"  {'met   ' if ok else 'NOT MET'}  {name}" for name, ok in summary.passed.items()
        ]
    return "\n".join(lines + [f"note: {note}" for note in summary.notes]).strip() + "\n"


def _evaluation_lines(evaluation: EvalSummary) -> list[str]:
    arms = [("before", evaluation.before), ("after", evaluation.after)]
    if evaluation.best_of_n:
        arms.append(("best of n", evaluation.best_of_n))
    lines = [f"evaluation on {evaluation.num_prompts} held-out prompts, {evaluation.told_confidence} intervals"]
    lines.append(f"{'':27}" + "".join(f"{name:>24}" for name, _ in arms))
    for metric, label in DISPLAY:
        if any(metric in values for _, values in arms):
            cells = "".join(f"{str(values[metric]) if metric in values else '-':>24}" for _, values in arms)
            lines.append(f"{label:27}{cells}")
    for name, part in evaluation.slices.items():
        if (delta := part.delta.get("follows_request")) is not None:
            worst = "  (worst slice)" if name == evaluation.worst_slice else ""
            lines.append(f"{'  change, ' + name:27}{delta!s:>24}{worst}")
    if (total := evaluation.delta.get("follows_request")) is not None:
        lines.append(f"{'change, all':27}{total!s:>24}")
    if evaluation.win_rate is not None:
        lines.append(f"{'win rate against the start':27}{evaluation.win_rate!s:>24}")
    return lines
