"""``rlhf run`` with learners of which one rank's gradient is not finite in some updates: ``python -m`` this module."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import cluster.context
from actors.learner import LearnerWorker
from cluster.cli import main
from rlhf.types import GroupHandle

FAULTY_RANK = 1
FAULTY_UPDATES = (2, 5, 6, 7)
"""Counted from 1 over the life of the worker: one alone, then three in a row."""


class FaultyLearner(LearnerWorker):
    """A learner whose rank 1 turns the gradient behind the last norm into NaN in the updates above."""

    num_updates = 0

    def update(self, groups: Sequence[GroupHandle]) -> dict[str, float]:
        """See ``LearnerWorker.update``."""
        self.num_updates += 1
        if self._group.rank != FAULTY_RANK or self.num_updates not in FAULTY_UPDATES:
            return super().update(groups)
        norm = self._engine.module.get_submodule("model.model.norm")
        hook = norm.register_full_backward_hook(_not_a_number)
        try:
            return super().update(groups)
        finally:
            hook.remove()


def _not_a_number(module: Any, gradients: Any, outputs: Any) -> Any:
    return tuple(gradient * math.nan for gradient in gradients)


if __name__ == "__main__":
    from tests.drills.faulty_run import FaultyLearner as ImportedLearner  # not __main__'s: ranks have to import it

    cluster.context.LearnerWorker = ImportedLearner  # type: ignore[misc]
    sys.exit(main())
