"""The null arm: a judge whose verdicts are dealt out at random."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from rlhf.types import Verdict


def shuffle_verdicts(verdicts: Sequence[Verdict], seed: int) -> tuple[Verdict, ...]:
    """Deals what a judge says of one prompt's siblings out among them: learning from it must improve nothing.

    The values keep their distribution over prompts and within each; only which sibling has which is lost. The reason of
    each verdict says what it was.

    Args:
        verdicts: On the siblings of one prompt.
        seed: Draws the order, together with the prompt.
    """
    dealt = list(verdicts)
    if verdicts:
        random.Random(f"{seed}/{verdicts[0].uid}").shuffle(dealt)
    return tuple(
        dataclasses.replace(verdict, value=other.value, error=other.error, reason=f"shuffled; was: {verdict.reason}")
        for verdict, other in zip(verdicts, dealt, strict=True)
    )
