"""One rank of an offline stage, as Ray Train starts it: the offline loop around a ``LearnerWorker``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.rank_saves import RankSaves
from actors.settings import LearnerConfig
from rlhf.data.groups import best_completions, read_groups, split_held_out
from rlhf.data.supervised import SupervisedDataConfig, load_supervised
from rlhf.errors import DataError, NonFiniteError
from rlhf.loops.offline import (
    OfflineConfig,
    OfflineHooks,
    check_batches,
    check_first_step,
    num_steps,
    tokens_from,
    train_offline,
)
from rlhf.maths.pairs import count_ordered_pairs
from rlhf.objectives.config import ObjectiveConfig
from rlhf.runs.checkpoint_config import CheckpointConfig
from rlhf.runs.directory import RunDirectory
from rlhf.runs.files import read_json, replacing_folder, unfinished_folder, write_json
from rlhf.runs.follow import STEPS_KNOWN
from rlhf.runs.metrics import MetricsLogger
from rlhf.types import TrainGroup

if TYPE_CHECKING:
    from actors.learner import LearnerWorker
    from rlhf.evaluation.bootstrap import Interval

KEEP_CHECKPOINTS = 2
"""The newest one, and one to fall back to where that one does not verify."""


@dataclass(frozen=True)
class OfflineJob:
    """What every rank of one offline stage is told.

    Attributes:
        kind: ``sft``, ``reward`` or ``preference``.
        learner: Its model is where training starts.
        objective: The loss.
        loop: Epochs and batches.
        run_dir: The run directory.
        stage: Names checkpoints, metrics and results.
        target: Where the trained model goes.
        groups: Folder of the feedback stage's training groups.
        records: Supervised records that are learned from instead; None takes the groups.
        held_out_fraction: Share of the prompts that is kept for evaluation; prompts of one subject stay together.
        min_score: Least score of a completion for rejection sampling, where it has one; None takes them all.
        max_sequence_tokens: Longest prompt and completion together.
        seed: Of split and order.
        threads: Compute threads of a rank; None takes all cores of its node.
        temperature: Logits are divided by it: the sampler's, where the policy learns from what it drew itself.
        checkpoints: Where checkpoints go, and how they are written.
        on_gpus: Whether the ranks have GPUs.
    """

    kind: str
    learner: LearnerConfig
    objective: ObjectiveConfig
    loop: OfflineConfig
    run_dir: Path
    stage: str
    target: Path
    groups: Path
    records: SupervisedDataConfig | None
    held_out_fraction: float
    min_score: float | None
    max_sequence_tokens: int
    seed: int
    threads: int | None
    temperature: float
    checkpoints: CheckpointConfig = CheckpointConfig()
    on_gpus: bool = False

    @property
    def stop_request(self) -> Path:
        """The file whose presence asks the ranks to save and end."""
        return self.run_dir / "control" / "stop"


def load_groups(job: OfflineJob) -> tuple[list[TrainGroup], list[TrainGroup]]:
    """The (training, held-out) groups, the same in every rank.

    Reward and preference stages learn from pairs: a prompt whose completions are all tied is left out.

    Raises:
        DataError: Fewer than two groups are left.
    """
    if job.records is not None:
        from rlhf.models.load import load_tokenizer

        groups = load_supervised(job.records, load_tokenizer(job.learner.model.path), job.max_sequence_tokens)
        found, action = f"{len(groups)} records", "Add records, or mend data.where and data.limit."
    else:
        # A driver that was killed while it wrote a file has left half of it, or a second one of the same prompts.
        labelled = read_groups(sorted(job.groups.glob("[!.]*.parquet")))
        if job.kind == "sft":
            groups = best_completions(labelled, min_score=job.min_score)
        else:
            groups = [group for group in labelled if group.ranks and count_ordered_pairs(group.ranks)]
        found = f"{len(groups)} of {len(labelled)} prompts of the feedback stage to learn from"
        action = "Collect more feedback; only prompts whose completions differ in rank count."
        if job.kind == "sft":
            action = "Collect more feedback" + ("." if job.min_score is None else ", or lower min_score.")
    if len(groups) < 2:
        raise DataError(f"stage {job.stage}", found=found, needed="at least 2", action=action)
    return split_held_out(groups, job.held_out_fraction, seed=job.seed)


def train_rank(config: Mapping[str, Any]) -> None:
    """Entry point of each rank; Ray Train has set up the process group."""
    import ray.train

    from actors.learner import LearnerWorker, RankInfo
    from actors.store import LocalStore

    job: OfflineJob = config["job"]
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    # Ray sets OMP_NUM_THREADS from the CPUs that the rank reserved, which may be a fraction of one.
    threads = job.threads or os.cpu_count() or 1
    groups, held_out = load_groups(job)
    check_batches(len(groups), job.loop, num_ranks, f"stage {job.stage}")
    worker = LearnerWorker(
        config=job.learner,
        store=LocalStore(),
        rank=RankInfo(rank=rank, world_size=num_ranks, threads=threads),
        objective=job.objective,
        total_steps=num_steps(len(groups), job.loop),
        temperature=job.temperature,
    )
    worker.start()
    session = _Session(job, worker, rank)
    first_step = session.resume()
    check_first_step(first_step, num_steps(len(groups), job.loop), f"stage {job.stage}: loop.epochs")
    session.say_steps(first_step, num_steps(len(groups), job.loop))
    timed = _TimedLearner(worker)
    try:
        done = train_offline(
            timed,
            groups,
            held_out,
            job.loop,
            session.hooks(),
            rank=rank,
            num_ranks=num_ranks,
            seed=job.seed,
            first_step=first_step,
        )
    except NonFiniteError:  # of all ranks at once, so they can still finish what they were saving
        session.end()
        raise
    session.end()
    if done == num_steps(len(groups), job.loop):
        tokens = tokens_from(groups, job.loop, seed=job.seed, first_step=first_step)
        session.finish(held_out, num_groups=len(groups), trained={"tokens": tokens, "seconds": timed.seconds})
    worker.stop()


class _TimedLearner:
    """A rank's learner as the loop sees it, which adds up the time that it trains."""

    def __init__(self, worker: LearnerWorker) -> None:
        self._worker = worker
        self.seconds = 0.0

    def train_step(self, groups: Sequence[TrainGroup]) -> Mapping[str, float]:
        began = time.monotonic()
        metrics = self._worker.train_step(groups)
        self.seconds += time.monotonic() - began
        return metrics

    def evaluate(self, groups: Sequence[TrainGroup]) -> Mapping[str, float]:
        return self._worker.evaluate(groups)


class _Session:
    """One rank's bookkeeping. Files are written by rank 0; every rank takes part in what is collective."""

    def __init__(self, job: OfflineJob, worker: Any, rank: int) -> None:
        self._job = job
        self._worker = worker
        self._rank = rank
        self._run = RunDirectory(job.run_dir)
        self._saves = RankSaves(
            job.checkpoints.storage(self._run, job.stage),
            worker,
            rank,
            keep=KEEP_CHECKPOINTS,
            in_background=job.checkpoints.writes_in_background(on_gpus=job.on_gpus),
            timeout_s=job.learner.deepspeed.collective_timeout_s,
        )
        self._metrics = MetricsLogger(self._run.metrics, tensorboard=self._run.tensorboard) if rank == 0 else None

    def hooks(self) -> OfflineHooks:
        return OfflineHooks(self._log, self._saves.save, self._should_stop)

    def resume(self) -> int:
        """Loads the newest verified checkpoint on every rank and returns its step, 0 where there is none."""
        step = self._saves.resume(self._event)
        if step is not None:
            self._event("stage_resumed", {"step": step})
        if self._metrics is not None:
            self._metrics.resume(self._job.stage, step or 0)
        return step or 0

    def say_steps(self, done: int, steps: int) -> None:
        """Says how much there is to do, which the driver cannot know: it has not read the data."""
        self._event(STEPS_KNOWN, {"steps": steps, "done": done})

    def _event(self, kind: str, fields: Mapping[str, Any]) -> None:
        if self._rank == 0:
            self._run.events.record(kind, stage=self._job.stage, **fields)

    def _log(self, step: int, metrics: Mapping[str, float], uids: Sequence[str]) -> None:
        if self._metrics is not None:
            self._metrics.log(self._job.stage, step, metrics)
            if metrics.get("skipped"):
                self._event("update_skipped", {"step": step, "uids": list(uids)})

    def _should_stop(self) -> bool:
        self._saves.check()
        return bool(self._worker.broadcast(self._job.stop_request.exists()))

    def end(self) -> None:
        """Waits for the last checkpoint, on every rank."""
        self._saves.finish()

    def finish(self, held_out: Sequence[TrainGroup], num_groups: int, trained: Mapping[str, float]) -> None:
        """Exports the model, then measures it on the held-out groups and writes the results for the driver.

        ``trained`` holds the ``tokens`` that all ranks trained on since they were started, and the ``seconds`` of it.
        """
        results: dict[str, Any] = {"num_groups": num_groups, "num_held_out": len(held_out), "trained": dict(trained)}
        if self._job.kind == "reward":
            self._worker.fit_normaliser(held_out if self._rank == 0 else [])
        self._export()
        if self._job.kind == "reward":
            results |= reward_results(self._worker, held_out)
        if self._rank == 0:
            write_json(_results_path(self._job), results)
        if self._metrics is not None:
            self._metrics.close()

    def _export(self) -> None:
        """Puts the trained model into its place, whole or not at all."""
        target = self._job.target
        with contextlib.ExitStack() as stack:
            if self._rank == 0:
                stack.enter_context(replacing_folder(target))
            self._worker.barrier()
            self._worker.export(unfinished_folder(target))
            self._worker.barrier()


def reward_results(worker: Any, held_out: Sequence[TrainGroup]) -> dict[str, Any]:
    """Pair accuracy and Kendall tau with intervals on rankings that the reward model has not seen.

    A measure for which they hold nothing to compare is None: the model is there either way.
    """
    from rlhf.evaluation.bootstrap import BootstrapConfig, resampled_by
    from rlhf.evaluation.reward_model import kendall_tau, pair_accuracy, pair_outcomes

    scores = worker.sequence_scores(held_out)
    ranks = [group.ranks or () for group in held_out]
    clusters = resampled_by([group.cluster for group in held_out], [group.uid for group in held_out])

    def measured(measure: Callable[..., Interval]) -> dict[str, Any] | None:
        try:
            return measure(scores, ranks, BootstrapConfig(), clusters).model_dump()
        except DataError:  # no two completions to compare
            return None

    return {
        "held_out": [group.uid for group in held_out],
        "pair_accuracy": measured(pair_accuracy),
        "kendall_tau": measured(kendall_tau),
        "num_pairs": sum(len(pair_outcomes(s, r)) for s, r in zip(scores, ranks, strict=True)),
    }


def _results_path(job: OfflineJob) -> Path:
    return job.run_dir / "checkpoints" / job.stage / "results.json"


def read_results(job: OfflineJob) -> dict[str, Any]:
    """What rank 0 left for the driver."""
    results: dict[str, Any] = read_json(_results_path(job))
    return results
