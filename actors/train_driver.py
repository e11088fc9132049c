"""Waits for the ranks of an offline stage in a process that can be ended."""

from __future__ import annotations

from collections.abc import Mapping

from actors.offline import OfflineJob, train_rank
from actors.training import Strategy, fit_ranks


class TrainDriver:
    """Waits where the run's driver could not be interrupted: Ray Train has no way out of a ``fit`` but its end.

    The ranks belong to this actor, so that they end with it, and their placement with them.
    """

    def fit(
        self,
        job: OfflineJob,
        *,
        num_ranks: int,
        cpus: float,
        gpus: float,
        strategy: Strategy,
        max_restarts: int,
        start_timeout_s: float,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Trains; arguments and errors are those of ``fit_ranks``."""
        fit_ranks(
            train_rank,
            job,
            num_ranks=num_ranks,
            cpus=cpus,
            gpus=gpus,
            strategy=strategy,
            max_restarts=max_restarts,
            start_timeout_s=start_timeout_s,
            labels=labels,
        )
