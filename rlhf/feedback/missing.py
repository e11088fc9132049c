"""How much feedback may be missing before a run has to stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlhf.errors import MissingFeedbackError


def check_missing(errors: Sequence[str], num_total: int, max_fraction: float, where: str) -> None:
    """Raises where more than ``max_fraction`` of verdicts or scores are missing.

    Args:
        errors: Why each missing verdict or score is missing.
        num_total: All that were asked for; 0 is allowed, and nothing is missing then.
        max_fraction: The largest share that a run may go on with, 0 to 1.
        where: Stage, step and source, for the error.
    """
    num_missing = len(errors)
    if num_missing <= max_fraction * num_total:
        return
    reason, count = Counter(errors).most_common(1)[0]
    raise MissingFeedbackError(
        where,
        found=f"{num_missing} of {num_total} missing ({num_missing / num_total:.0%}), {count} of them because: "
        f"{reason or 'no reason given'}",
        needed=f"at most {max_fraction:.0%}",
        action="Mend what answers and run the same command again; raise the stage's max_missing_fraction only if the "
        "missing ones are harmless.",
    )
