"""What an evaluation can measure: the recipe and the prompts decide which instruments have what they need.

An instrument without its input is left out and named, with the reason: people's feedback needs no judge, and a prompt
need not ask for praise or scorn. A column or a sign that the recipe names itself has to be there, and no column may be
there for some prompts only: either is a mistake, not a choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.errors import DataError
from rlhf.evaluation.report_card import ReportCardConfig
from rlhf.types import Prompt

RESULTS = {
    "judge": ("judge_margin", "win_rate"),
    "reward_model": ("reward_model", "best_of_n"),
    "sentiment": ("follows_request",),
    "slices": ("slices", "worst_slice"),
    "subject": ("on_topic",),
}
"""What each instrument brings into the summary."""

_COLUMNS = {"judge": "judge_margin", "reward_model": "reward_model", "sentiment": "vader"}
_DEFAULT = ReportCardConfig()


@dataclass(frozen=True, slots=True)
class Instruments:
    """The instruments of one evaluation.

    Attributes:
        left_out: Those of ``RESULTS`` that do not measure, each with the reason.
    """

    left_out: Mapping[str, str]

    def __contains__(self, name: str) -> bool:
        return name not in self.left_out

    @property
    def unmeasured(self) -> frozenset[str]:
        """Columns of ``EvalCompletion`` that are empty on purpose, and so are not counted as missing."""
        return frozenset(column for name, column in _COLUMNS.items() if name in self.left_out)

    def notes(self) -> list[str]:
        """What a reader of the summary must know, one sentence per instrument that was left out."""
        return [f"The evaluation has no {' and no '.join(RESULTS[n])}: {why}." for n, why in self.left_out.items()]


def choose_instruments(
    prompts: Sequence[Prompt], card: ReportCardConfig, *, judged: bool, has_reward_model: bool, where: str
) -> Instruments:
    """Finds out which instruments have their inputs.

    Args:
        prompts: The held-out prompts.
        card: Names the columns and the signs.
        judged: Whether a constitution is kept for the evaluation.
        has_reward_model: Whether a reward model was trained.
        where: Named by errors.

    Raises:
        DataError: A column is there for some prompts only, or one that the recipe names is not there at all; a request
            has no sign while others have.
    """
    left_out: dict[str, str] = {}
    if not judged:
        left_out["judge"] = "constitutions.evaluation is not set"
    if not has_reward_model:
        left_out["reward_model"] = "no reward model was trained"
    if not _is_there(prompts, card, "slice_field", where):
        left_out["slices"] = left_out["sentiment"] = f"no prompt has a column {card.slice_field!r}"
    elif reason := _no_signs(prompts, card, where):
        left_out["sentiment"] = reason
    if not _is_there(prompts, card, "subject_field", where):
        left_out["subject"] = f"no prompt has a column {card.subject_field!r}"
    _is_there(prompts, card, "keywords_field", where)
    return Instruments(left_out)


def require_signs(prompts: Sequence[Prompt], card: ReportCardConfig, where: str) -> None:
    """Raises ``DataError`` unless every prompt asks for something that has a sign."""
    for prompt in prompts:
        if prompt.fields.get(card.slice_field) not in card.request_signs:
            raise _no_sign(prompt, card, where)


def _is_there(prompts: Sequence[Prompt], card: ReportCardConfig, key: str, where: str) -> bool:
    """Whether the prompts have the column that ``key`` of the report card names."""
    column: str = getattr(card, key)
    without = [prompt for prompt in prompts if not prompt.fields.get(column, "").strip()]
    if not without:
        return True
    named = column != getattr(_DEFAULT, key)
    if named and len(without) == len(prompts) or key == "slice_field" and len(without) < len(prompts):
        raise DataError(
            f"{where}: report_card.{key}, prompt {without[0].uid}",
            found=f"no {column!r}",
            needed="the column in every prompt",
            action=f"Fill it in, or mend report_card.{key}.",
        )
    return len(without) < len(prompts)


def _no_signs(prompts: Sequence[Prompt], card: ReportCardConfig, where: str) -> str:
    """Why the independent scorer cannot tell whether a request was followed; empty where it can."""
    if card.independent is None:
        return "report_card.independent is null"
    unknown = [prompt for prompt in prompts if prompt.fields[card.slice_field] not in card.request_signs]
    if not unknown:
        return ""
    if len(unknown) < len(prompts) or card.independent != _DEFAULT.independent:
        raise _no_sign(unknown[0], card, where)
    return f"no value of {card.slice_field!r} has a sign in report_card.independent.request_signs"


def _no_sign(prompt: Prompt, card: ReportCardConfig, where: str) -> DataError:
    value = prompt.fields.get(card.slice_field)
    return DataError(
        f"{where}, prompt {prompt.uid}",
        found=f"no {card.slice_field!r}" if value is None else f"{card.slice_field} = {value!r}",
        needed=f"{card.slice_field} in {sorted(card.request_signs)} (report_card.independent.request_signs)",
        action="Mend the row, give the value a sign, or do without the measure: report_card.independent: null in an "
        "evaluation, measure_agreement: false in a feedback stage.",
    )
