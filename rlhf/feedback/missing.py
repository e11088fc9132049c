"""How much feedback may be missing before a run has to stop."""

from __future__ import annotations

from rlhf.errors import MissingFeedbackError


def check_missing(num_missing: int, num_total: int, max_fraction: float, where: str) -> None:
    """Raises where more than ``max_fraction`` of verdicts or scores are missing.

    Args:
        num_missing: Verdicts or scores without a value.
        num_total: All that were asked for; 0 is allowed, and nothing is missing then.
        max_fraction: The largest share that a run may go on with, 0 to 1.
        where: Stage, step and source, for the error.
    """
    if num_missing <= max_fraction * num_total:
        return
    raise MissingFeedbackError(
        where,
        found=f"{num_missing} of {num_total} missing ({num_missing / num_total:.0%})",
        needed=f"at most {max_fraction:.0%}",
        action="See the errors kept beside the missing ones in the run's records; raise max_missing_fraction only if "
        "they are harmless.",
    )
