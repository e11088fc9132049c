"""Starts the ranks of an offline stage with Ray Train and waits for them, in a process that can be ended."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from actors.offline import OfflineJob
from rlhf.errors import LearnerError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


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
        max_failures: int,
        storage: Path,
    ) -> None:
        """Trains; returns when all ranks have finished or have stopped as they were asked to.

        Args:
            job: What every rank is told.
            num_ranks: Ranks of the gang.
            cpus: Of one rank, in Ray's count.
            gpus: Of one rank.
            strategy: How the ranks are laid over nodes.
            max_failures: Gangs that are started again after a failure.
            storage: Where Ray Train keeps its own records.

        Raises:
            LearnerError: The training failed for good.
        """
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        from actors.offline import train_rank

        trainer = TorchTrainer(
            train_rank,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_ranks,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
                placement_strategy=strategy,
            ),
            run_config=RunConfig(
                name=job.stage, storage_path=str(storage), failure_config=FailureConfig(max_failures=max_failures)
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise LearnerError(
                f"stage {job.stage}", found=str(error), needed="a finished training", action="See the cause above."
            ) from None
