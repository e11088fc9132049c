"""Label log-probs to verdicts, and pairwise verdicts in both orders to one outcome.

A verdict that could not be had keeps its reason and has no value: it is never a number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.feedback.constitution import Constitution
from rlhf.feedback.prompts import JudgeRequest
from rlhf.types import Verdict

Disagreement = Literal["tie", "none"]
"""What two orders that name different winners amount to: a tie, or no outcome."""


@dataclass(frozen=True, slots=True)
class PairOutcome:
    """What both orders of one pair came to.

    Attributes:
        uid: The prompt's uid.
        samples: The two siblings, the lower index first.
        value: 1.0 where the first is better, 0.0 where the second is, 0.5 for a tie; None where unknown.
        error: Why the value is missing; empty where there is one.
    """

    uid: str
    samples: tuple[int, int]
    value: float | None
    error: str = ""


def label_margin(log_probs: Mapping[str, float], labels: tuple[str, str]) -> float:
    """Returns log p(positive) - log p(negative), in nats.

    Raises:
        ValueError: A label is missing or its log-probability is not finite; the message says which.
    """
    values = []
    for label in labels:
        if label not in log_probs:
            raise ValueError(f"no log-probability for label {label!r}")
        if not math.isfinite(log_probs[label]):
            raise ValueError(f"log-probability of label {label!r} is {log_probs[label]}")
        values.append(float(log_probs[label]))
    return values[0] - values[1]


def make_verdict(
    constitution: Constitution,
    request: JudgeRequest,
    log_probs: Mapping[str, float] | None,
    *,
    sign: float,
    centre: float,
    judge: str,
    error: str = "",
) -> Verdict:
    """Turns one answer of a judge into a verdict: sign x (margin - centre).

    Args:
        constitution: Under which the question was put.
        request: The question.
        log_probs: Log-probability of each label as the continuation; None where the judge failed.
        sign: ``constitution.sign_of(prompt)``.
        centre: The margin that counts as zero; see ``fixed_centre``.
        judge: Name of the judging model, for the record.
        error: Why there is no answer; used where ``log_probs`` is None.
    """
    who = f"{judge} under {constitution.config.name}@{constitution.fingerprint[:8]}"
    if log_probs is None:
        error = error or "the judge gave no answer"
        return Verdict(request.uid, request.samples, None, reason=request.note, judge=who, error=error)
    try:
        margin = label_margin(log_probs, request.labels)
    except ValueError as fault:
        return Verdict(request.uid, request.samples, None, reason=request.note, judge=who, error=str(fault))
    words = "; ".join(f"log p({label!r}) = {log_probs[label]:.4f}" for label in request.labels)
    reason = f"{words}; centre {centre:.4f}; sign {sign:+g}" + (f"; {request.note}" if request.note else "")
    return Verdict(request.uid, request.samples, sign * (margin - centre), reason=reason, judge=who)


def fixed_centre(constitution: Constitution) -> float | None:
    """Returns the constitution's centre, or None where it must be measured with ``content_free_request``."""
    centre = constitution.config.centre
    return centre if isinstance(centre, float) else None


def pair_outcomes(verdicts: Sequence[Verdict], *, disagreement: Disagreement) -> list[PairOutcome]:
    """Joins the two orders of every pair among one prompt's pairwise verdicts.

    Both orders favour the same text: it wins. They differ, or one of them is exactly even: a tie, or no outcome, as
    ``disagreement`` says. An order whose verdict is missing leaves the pair without an outcome.

    Raises:
        ValueError: A verdict is not of two siblings, or an order is there twice.
    """
    by_order: dict[tuple[int, int], Verdict] = {}
    for verdict in verdicts:
        if len(verdict.samples) != 2:
            raise ValueError(f"verdict on siblings {verdict.samples} is not pairwise")
        order = (verdict.samples[0], verdict.samples[1])
        if order in by_order:
            raise ValueError(f"two verdicts for the order {order} of prompt {verdict.uid}")
        by_order[order] = verdict
    outcomes = []
    for first, second in sorted({(min(order), max(order)) for order in by_order}):
        forward, backward = by_order.get((first, second)), by_order.get((second, first))
        outcomes.append(_join(verdicts[0].uid, (first, second), forward, backward, disagreement))
    return outcomes


def _join(
    uid: str,
    samples: tuple[int, int],
    forward: Verdict | None,
    backward: Verdict | None,
    disagreement: Disagreement,
) -> PairOutcome:
    if forward is None or backward is None:
        return PairOutcome(uid, samples, None, "one order was not judged")
    if forward.value is None or backward.value is None:
        return PairOutcome(uid, samples, None, forward.error or backward.error)
    if forward.value > 0 > backward.value:
        return PairOutcome(uid, samples, 1.0)
    if forward.value < 0 < backward.value:
        return PairOutcome(uid, samples, 0.0)
    if disagreement == "tie":
        return PairOutcome(uid, samples, 0.5)
    return PairOutcome(uid, samples, None, "the two orders disagree")


def cache_key(judge: str, constitution: Constitution, prompt: str, completions: Sequence[str]) -> str:
    """Returns the name under which a verdict may be kept and found again.

    Args:
        judge: Name of the judging model.
        constitution: Under which it judges.
        prompt: The prompt's text.
        completions: The judged text, or two in the order shown.
    """
    digest = hashlib.blake2b(digest_size=20)
    for part in (judge, constitution.fingerprint, prompt, *completions):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
