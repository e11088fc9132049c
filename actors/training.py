"""The ranks of an offline stage under Ray Train: their start, and what a failure of theirs amounts to.

Ray Train repeats every failure alike. Its own restarts are switched off, and made here where another try can help.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    RayTrainError,
    WorkerGroupStartupTimeoutError,
)

from actors.offline import OfflineJob
from actors.restarts import ProgressBudget
from rlhf.errors import LearnerError, PlacementError, RlhfError
from rlhf.runs import checkpoint
from rlhf.runs.directory import RunDirectory

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

_MAY_PASS = (LearnerError, RayError, RayTrainError, RuntimeError, OSError)
"""Failures of machines, networks and collectives. Data, settings and faults of the code are the same at every try."""

_NO_ROOM = (WorkerGroupStartupTimeoutError, InsufficientClusterResourcesError)


def fit_ranks(
    train: Callable[[dict[str, Any]], None],
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
    """Runs ``train`` in every rank; returns when all have finished, or have stopped as they were asked to.

    Args:
        train: A rank's work, given ``{"job": job}``; resumes from the last verified checkpoint.
        job: What every rank is told.
        num_ranks: Ranks of the gang.
        cpus: Of one rank, in Ray's count.
        gpus: Of one rank.
        strategy: How the ranks are laid over nodes.
        max_restarts: Lost gangs that are started again without a newer checkpoint in between.
        start_timeout_s: Longest wait for room.
        labels: What a node must be labelled with to take a rank; None takes any node.

    Raises:
        RlhfError: The ranks' own error, see ``failure_of``.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout_s)
    once: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0}
    trainer = TorchTrainer(
        train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(
            backend="nccl" if gpus else "gloo", timeout_s=math.ceil(job.learner.deepspeed.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # checked against the one of Ray Train before 2
            num_workers=num_ranks,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
            placement_strategy=strategy,
            label_selector=dict(labels or {}) or None,
        ),
        run_config=RunConfig(
            name=job.stage, storage_path=str(job.run_dir / "ray_train"), failure_config=FailureConfig(**once)
        ),
    )
    run = RunDirectory(job.run_dir)
    events = run.events
    storage = job.checkpoints.storage(run, job.stage)
    fit_with_restarts(
        trainer.fit,
        job.stage,
        ProgressBudget(max_restarts, lambda: max(checkpoint.steps(storage), default=-1)),
        stop_request=job.stop_request,
        on_event=lambda kind, fields: events.record(kind, stage=job.stage, **fields),
    )


def fit_with_restarts(
    fit: Callable[[], object],
    stage: str,
    budget: ProgressBudget,
    *,
    stop_request: Path,
    on_event: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Calls ``fit`` until it succeeds; every further try starts the gang again, from the last verified checkpoint.

    Args:
        fit: Trains; its own restarts are off.
        stage: Names the stage in errors.
        budget: Further tries.
        stop_request: File whose presence asks the run to stop; nothing is tried again then.
        on_event: Receives each restart.

    Raises:
        RlhfError: What ``failure_of`` says of a failure that no further try can mend, or of the last one.
    """
    while True:
        try:
            fit()
            return
        except (TrainingFailedError, RayError) as failed:
            error = failure_of(failed, stage)
            restarts_left = budget.left
            if not may_pass(failed) or stop_request.exists() or not budget.take():
                raise error from None  # Ray's own says the same at length, and the ranks' logs have the traceback
            on_event("gang_lost", {"role": "learner", "restarts_left": restarts_left, "error": str(error)})


def failure_of(failed: Exception, stage: str) -> RlhfError:
    """The typed error in which a training ended: the ranks' own where they raised one, else a ``LearnerError``.

    A rank's error is mostly followed by others: of ranks that waited for it. What no further try can mend comes first.
    """
    causes = _causes(failed)
    if isinstance(causes[0], _NO_ROOM):
        return PlacementError(
            f"stage {stage}",
            found="no room for the learner's ranks in its start_timeout_s",
            needed="roles.learner.ranks times its resources on free nodes",
            action="Free the cluster, lower ranks or resources, or raise start_timeout_s.",
        )
    typed = [cause for cause in causes if isinstance(cause, RlhfError)]
    final = [cause for cause in typed if not isinstance(cause, LearnerError)]
    if final or typed:
        return (final or typed)[0]
    first = next((cause for cause in causes if not isinstance(cause, _MAY_PASS)), causes[0])
    return LearnerError(
        f"stage {stage}",
        found=f"{type(first).__name__}: {first}",
        needed="a finished training",
        action="Look into the ranks' logs; the same command goes on from the last checkpoint.",
    )


def may_pass(failed: Exception) -> bool:
    """Whether the same training may well succeed another time."""
    return all(isinstance(cause, _MAY_PASS) and not isinstance(cause, _NO_ROOM) for cause in _causes(failed))


def _causes(failed: Exception) -> list[Exception]:
    """The ranks' exceptions in rank order, the controller's, or the failure itself."""
    if isinstance(failed, WorkerGroupError) and failed.worker_failures:
        return [failure for _, failure in sorted(failed.worker_failures.items())]
    return [failed.controller_failure] if isinstance(failed, ControllerError) else [failed]
