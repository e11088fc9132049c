"""The rows of an evaluation: one per completion in memory, one per prompt and sample on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import DataError

ARMS = ("before", "after", "best_of_n")
"""The starting model, the trained model, and the starting model's best of n completions by the reward model."""

_SHARED = ("uid", "sample", "prompt", "request", "subject", "keywords")


@dataclass(frozen=True, slots=True)
class EvalCompletion:
    """One completion of a held-out prompt with everything that was measured on it.

    Attributes:
        uid: The prompt's uid.
        sample: Which of the prompt's completions, from 0.
        arm: One of ``ARMS``.
        prompt: What was asked, as text.
        request: The slice, for example ``"scathing"``; empty where the prompts name none.
        subject: What the text has to be about, for example ``"a heist"``; empty where the prompt does not say.
        keywords: Stems that show that it is, separated by spaces; empty takes the subject's own words.
        text: The completion.
        num_tokens: Tokens of the completion, end-of-text included.
        finish_reason: ``"stop"`` or ``"length"``.
        vader: The independent scorer's sentiment, -1 to 1.
        judge_margin: The judge's margin towards what was asked, under the prompt kept for evaluation.
        reward_model: The reward model's score.
        kl_per_token: Mean over tokens of log p(token) - log p_start(token), nats.
        nll_start: Mean over tokens of -log p_start(token), nats.

    A measure is None where it could not be had; None is left out of means and counted.
    """

    uid: str
    sample: int
    arm: str
    prompt: str
    request: str
    subject: str
    text: str
    num_tokens: int
    finish_reason: str
    vader: float | None = None
    judge_margin: float | None = None
    reward_model: float | None = None
    kl_per_token: float | None = None
    nll_start: float | None = None
    keywords: str = ""


MEASURES = tuple(f.name for f in dataclasses.fields(EvalCompletion) if f.name not in (*_SHARED, "arm", "text"))
"""Columns that each arm has on disk under its name, for example ``after_num_tokens``; the text's is ``after``."""


def to_wide(rows: Iterable[EvalCompletion]) -> list[dict[str, Any]]:
    """One dict per prompt and sample: shared columns, then ``before``, ``before_num_tokens``, ..., ``after``, ...

    An arm without this sample (best of n has one per prompt) is None in all its columns.

    Raises:
        DataError: Two completions of one arm have the same uid and sample, or an arm is unknown.
    """
    wide: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        where = f"evaluation {row.uid} sample {row.sample}"
        if row.arm not in ARMS:
            raise DataError(where, found=f"arm {row.arm!r}", needed=f"one of {', '.join(ARMS)}", action="Mend the row.")
        empty = {column: None for arm in ARMS for column in (arm, *(f"{arm}_{name}" for name in MEASURES))}
        shared = {name: getattr(row, name) for name in _SHARED}
        target = wide.setdefault((row.uid, row.sample), shared | empty)
        if target[row.arm] is not None:
            action = "Number the samples of a prompt from 0."
            raise DataError(where, found=f"two rows of {row.arm}", needed="one", action=action)
        target[row.arm] = row.text
        for name in MEASURES:
            target[f"{row.arm}_{name}"] = getattr(row, name)
    return list(wide.values())


def from_wide(rows: Sequence[Mapping[str, Any]]) -> list[EvalCompletion]:
    """The inverse of ``to_wide``."""
    completions = []
    for row in rows:
        for arm in ARMS:
            if row.get(arm) is not None:
                measures = {name: row[f"{arm}_{name}"] for name in MEASURES}
                shared = {name: row[name] for name in _SHARED}
                completions.append(EvalCompletion(**shared, **measures, arm=arm, text=row[arm]))
    return completions
