"""One rank of a learner: any objective, online or offline, on packed rows, under DeepSpeed.

Every method but ``rendezvous``, ``join``, ``stop`` and those of ``RankCheckpoints`` is collective: all ranks of the
gang call it together. A step is split into micro-batches whose number is the same on every rank; losses carry global
denominators, so the split does not change what is learned.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from actors.deepspeed.engine import TrainEngine
from actors.deepspeed.export import WeightExporter
from actors.health import ProbedThread, observed
from actors.packed_runner import PackedRunner
from actors.rank_state import RankCheckpoints
from actors.ranks import ProcessGroup, RankInfo, free_port
from actors.scorer import ScoreNormaliser
from actors.settings import LearnerConfig
from actors.step_totals import StepTotals
from actors.store import Store, fetch_all
from actors.training_groups import fetch_group
from rlhf.algorithms.build import build_algorithm
from rlhf.algorithms.config import AlgorithmConfig
from rlhf.errors import ConfigError, DataError, LearnerError, RolloutsLostError
from rlhf.maths.packing import PackedBatch, pack, pad_tokens
from rlhf.models.forward import PackedModel
from rlhf.models.load import load_policy, load_scalar, load_tokenizer
from rlhf.objectives.base import Denominators, LossResult, ModelOutputs, Objective, TokenSignals, sequences_of_groups
from rlhf.objectives.build import build_objective
from rlhf.objectives.config import ObjectiveConfig
from rlhf.objectives.value import ValueObjective
from rlhf.types import GroupHandle, TrainGroup

__all__ = ["LearnerWorker", "RankInfo"]

REFERENCE = "reference_log_probs"
OLD = "old_log_probs"
VALUES = "values"


@dataclass(frozen=True, slots=True)
class _StepSignals:
    """Signals of a whole step, and the batch that says which sequences belong to which group."""

    batch: PackedBatch
    signals: TokenSignals

    def cut(self, groups: Sequence[int], batch: PackedBatch) -> TokenSignals:
        """The signals of a micro-batch that was packed from ``groups`` of the step."""
        return self.signals.select(sequences_of_groups(self.batch, groups), batch.target_ids.shape[1])


class LearnerWorker(ProbedThread, RankCheckpoints):
    """Trains one model. Give it an algorithm (policy or critic of the online loop) or an objective (offline).

    Args:
        config: Model, optimizer, DeepSpeed.
        store: Where rollouts live.
        rank: This rank.
        algorithm: Gives objective, advantages, epochs and mini-batches.
        objective: The loss, where there is no algorithm.
        total_steps: Calls of ``update`` or ``train_step`` in all, for the learning-rate schedule.
        temperature: The sampler's; logits are divided by it.
        may_be_stale: Whether rollouts may come from weights before the current ones; old log-probs are then computed
            from the current ones at the start of the step.
        is_critic: Whether it learns the algorithm's value objective instead of its policy objective.
    """

    def __init__(
        self,
        config: LearnerConfig,
        store: Store,
        rank: RankInfo,
        *,
        algorithm: AlgorithmConfig | None = None,
        objective: ObjectiveConfig | None = None,
        total_steps: int,
        temperature: float = 1.0,
        may_be_stale: bool = False,
        is_critic: bool = False,
    ) -> None:
        if (algorithm is None) == (objective is None):
            raise ConfigError(
                "learner", found="both or neither of them", needed="an algorithm or an objective", action="Give one."
            )
        self._config, self._store, self._info = config, store, rank
        self._algorithm = None if algorithm is None else build_algorithm(algorithm)
        self._objective = self._choose_objective(objective, is_critic)
        self._total_steps = total_steps
        self._temperature = temperature
        self._may_be_stale = may_be_stale
        self._normaliser: ScoreNormaliser | None = None
        self._exporter: WeightExporter
        self._runner: PackedRunner
        self._group: ProcessGroup

    def _choose_objective(self, objective: ObjectiveConfig | None, is_critic: bool) -> Objective:
        if objective is not None:
            return build_objective(objective)
        assert self._algorithm is not None
        chosen = self._algorithm.value_objective() if is_critic else self._algorithm.policy_objective()
        if chosen is None:
            raise ConfigError("critic", found="an algorithm without one", needed="PPO", action="Leave the critic out.")
        return chosen

    # Lifecycle

    def rendezvous(self) -> tuple[str, int]:
        """This rank's address and a free port, where it is to be rank 0."""
        import ray

        # Not the address of the host's own name: on many machines that is 127.0.1.1, which no other node can reach.
        return ray.util.get_node_ip_address(), free_port()

    def join(self, address: str, port: int) -> None:
        """Tells the rank where rank 0 waits; before ``start``."""
        self._info = replace(self._info, master_address=address, master_port=port)

    def start(self) -> None:
        """Joins the process group and loads the model."""
        config = self._config
        if self._info.threads is not None:
            torch.set_num_threads(self._info.threads or os.cpu_count() or 1)
        seed = config.seed or 0  # in a recipe's learner it is set, to the run's where it was not given
        torch.manual_seed(seed)
        self._group = ProcessGroup(self._info, timeout_s=config.deepspeed.collective_timeout_s)
        model = load_policy(config.model) if self._objective.head == "language_model" else load_scalar(config.model)
        self._engine = TrainEngine(
            PackedModel(model, self._objective.head),
            config.deepspeed,
            config.optim,
            group=self._group,
            dtype=config.model.dtype,
            total_steps=self._total_steps * self._updates_per_step,
        )
        self._engine.module.register_forward_hook(lambda *_: self.progress())
        pad = load_tokenizer(config.model.path).pad_token_id
        self._pad_id = 0 if pad is None else int(pad)
        self._runner = PackedRunner(
            self._engine, model, self._group, config, pad_id=self._pad_id, temperature=self._temperature
        )
        self._runner.progress = self.progress
        self._exporter = WeightExporter(self._engine, model, rank=self._group.rank, dtype=config.model.dtype)
        # From here on ranks draw different dropout masks.
        torch.manual_seed(seed + 1 + self._group.rank)

    @property
    def _updates_per_step(self) -> int:
        return 1 if self._algorithm is None else self._algorithm.num_epochs * self._algorithm.num_mini_batches

    def stop(self) -> None:
        """Leaves the process group."""
        self._engine.close()
        self._group.close()

    def barrier(self) -> None:
        """Waits for all ranks."""
        self._group.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; plain data only."""
        return self._group.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in rank order, on every rank; plain data only."""
        return self._group.gather(value)

    # Training

    @observed
    def update(self, groups: Sequence[GroupHandle]) -> dict[str, float]:
        """One step of the online loop on this rank's groups: all epochs and mini-batches.

        Returns:
            Metrics, the same on every rank: the objective's, reduced over ranks, and the optimizer's.

        Raises:
            NonFiniteError: The third optimizer step in a row with a number that is not finite.
            DataError: A group misses what the algorithm needs.
            RolloutsLostError: Groups of some rank went away with their node; every rank says so, before any of them
                has computed anything.
        """
        if self._algorithm is None:
            raise LearnerError("update", found="an offline objective", needed="an algorithm", action="Use train_step.")
        algorithm = self._algorithm
        found = self._fetch(groups)
        if algorithm.needs_reference and self._objective.head == "language_model":
            found = self._with_reference(found)
        batch = pack(found, pad_id=self._pad_id)
        raw = TokenSignals.from_groups(found, batch)
        if raw.old_log_probs is None and self._needs_old_log_probs():
            raw = replace(raw, old_log_probs=pad_tokens(self._runner.log_probs(found), batch))
        signals = algorithm.signals(batch, raw, self._group.sum)
        steps = StepTotals()
        for _ in range(algorithm.num_epochs):
            for part in self._mini_batches(len(found), algorithm.num_mini_batches):
                self._optimizer_step(found, part, _StepSignals(batch, signals), steps)
        return steps.reduced(self._group)

    def _fetch(self, handles: Sequence[GroupHandle]) -> list[TrainGroup]:
        """Reads this rank's groups; where any rank lacks some, all of them raise the same error."""
        found: list[TrainGroup] = []
        lost: tuple[str, ...] = ()
        cause = "seen by another rank"
        try:
            found = fetch_all(handles, self._store, fetch_group, where="learner")
        except RolloutsLostError as error:
            lost, cause = error.uids, error.found
        # The ranks agree here, as one that went on alone would wait in its next collective for the others.
        lost_anywhere = self._group.gather_names(lost)
        if lost_anywhere:
            raise RolloutsLostError.of("learner", lost_anywhere, cause)
        return found

    def _needs_old_log_probs(self) -> bool:
        """Whether the step needs log-probs that nobody has annotated; a critic cannot compute them itself."""
        assert self._algorithm is not None
        if self._objective.head == "language_model":
            return self._updates_per_step > 1 or self._may_be_stale
        if self._algorithm.shares_old_log_probs:
            raise DataError("critic", found="groups without them", needed=OLD, action="Have the policy annotate first.")
        return False

    def _mini_batches(self, num_groups: int, num_parts: int) -> list[range]:
        parts = [range(start, num_groups, num_parts) for start in range(num_parts)]
        if not all(parts):
            raise DataError(
                "learner batch",
                found=f"{num_groups} groups on a rank",
                needed=f"at least {num_parts}, one per mini-batch",
                action="Raise loop.prompts_per_step or lower algorithm.num_mini_batches.",
            )
        return parts

    def train_step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """One optimizer step of an offline objective on this rank's share; metrics as in ``update``."""
        found = list(groups)
        if self._objective.needs_reference:
            found = self._with_reference(found)
        steps = StepTotals()
        self._optimizer_step(found, range(len(found)), None, steps)
        return steps.reduced(self._group)

    def _optimizer_step(
        self, groups: Sequence[TrainGroup], part: Sequence[int], signals: _StepSignals | None, totals: StepTotals
    ) -> None:
        """One optimizer step on ``part`` of this rank's groups."""
        chosen = [groups[i] for i in part]
        denominators = self._denominators(chosen)
        plan = self._runner.plan(chosen)
        for number, indices in enumerate(plan, 1):
            # An empty micro-batch runs some group again, without weight, for the collectives inside the model.
            result = self._loss(groups, [part[i] for i in indices] or [part[0]], signals, denominators)
            self._engine.backward(result.loss if indices else result.loss * 0.0, last=number == len(plan))
            if indices:
                totals.add(result.metrics)
        totals.add_step(self._engine.step())

    def _loss(
        self,
        groups: Sequence[TrainGroup],
        indices: Sequence[int],
        signals: _StepSignals | None,
        denominators: Denominators,
    ) -> LossResult:
        part = [groups[i] for i in indices]
        batch = self._runner.pack(part)
        cut = TokenSignals.from_groups(part, batch) if signals is None else signals.cut(indices, batch)
        batch, cut = batch.to(self._group.device), cut.to(self._group.device)
        outputs = ModelOutputs(**self._engine.forward(batch, self._options()))
        return self._objective.loss(outputs, batch, cut, denominators)

    def _options(self) -> dict[str, Any]:
        if self._objective.head == "language_model":
            # Entropy costs little and is the first to show a policy that collapses.
            wanted = self._objective.needs_entropy or self._algorithm is not None
            return {"temperature": self._temperature, "need_entropy": wanted}
        return {"per_token": isinstance(self._objective, ValueObjective)}

    def _denominators(self, groups: Sequence[TrainGroup]) -> Denominators:
        own = self._objective.count(groups)
        return Denominators(*self._group.sum_floats([own.tokens, own.sequences, own.groups]))

    # Without training

    def evaluate(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """The objective's metrics over all ranks' groups, without an update; a rank may have none."""
        found = list(groups)
        if self._objective.needs_reference:
            found = self._with_reference(found)
        denominators = self._denominators(found)
        totals = StepTotals()
        with self._engine.inference():
            for indices in self._runner.plan(found):
                if indices:
                    totals.add(self._loss(found, indices, None, denominators).metrics)
                else:  # the collectives inside the model need every rank
                    self._engine.forward(self._runner.pack([]).to(self._group.device), self._options())
        return totals.reduced(self._group)

    @observed
    def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        """Adds what this learner knows before it trains on the groups.

        A critic adds its values. A policy adds its log-probs, so that whoever needs those of the start of the step has
        the same ones, and the reference's where the algorithm needs them and no other role gave them.
        """
        found = self._fetch(groups)
        if self._objective.head != "language_model":
            return self._with_annotation(groups, VALUES, self._runner.values(found))
        if self._algorithm is not None and self._algorithm.needs_reference:
            filled = self._with_reference(found)
            if any(group.reference_log_probs is None for group in found):
                groups = self._with_annotation(groups, REFERENCE, [group.reference_log_probs for group in filled])
        return self._with_annotation(groups, OLD, self._runner.log_probs(found))

    def _with_annotation(self, groups: Sequence[GroupHandle], name: str, values: Sequence[Any]) -> list[GroupHandle]:
        return [
            replace(group, annotations={**group.annotations, name: self._store.put(value)})
            for group, value in zip(groups, values, strict=True)
        ]

    def sequence_scores(self, groups: Sequence[TrainGroup]) -> list[list[float]]:
        """The reward model's scores of this rank's groups, in their order."""
        return self._runner.scores(groups)

    def fit_normaliser(self, groups: Sequence[TrainGroup]) -> ScoreNormaliser:
        """Measures mean and standard deviation of scores over all ranks' groups; ``export`` then saves them."""
        scores = [score for group in self.sequence_scores(groups) for score in group]
        count, total, squares = self._group.sum_floats([len(scores), sum(scores), sum(s * s for s in scores)])
        mean = total / count if count else 0.0
        variance = squares / count - mean * mean if count else 1.0
        self._normaliser = ScoreNormaliser(mean, variance**0.5 if variance > 0 else 1.0)
        return self._normaliser

    def _with_reference(self, groups: Sequence[TrainGroup]) -> list[TrainGroup]:
        """Fills in reference log-probs where no other role has annotated them."""
        lacking = [i for i, group in enumerate(groups) if group.reference_log_probs is None]
        if self._group.max_int(len(lacking)) == 0:
            return list(groups)
        found = self._runner.reference_log_probs([groups[i] for i in lacking])
        filled = list(groups)
        for i, values in zip(lacking, found, strict=True):
            filled[i] = replace(groups[i], reference_log_probs=values)
        return filled

    # Weights and state

    def export_plan(self, bucket_bytes: int, dtype: str | None = None) -> list[list[str]]:
        """Names of the weights in each bucket, for the buckets that follow; ``dtype`` defaults to the model's own."""
        return self._exporter.plan(bucket_bytes, dtype)

    def put_bucket(self, index: int) -> tuple[Any, str, int] | None:
        """Puts a bucket of the plan in the store: its handle, digest and bytes on rank 0, None elsewhere."""
        bucket = self._exporter.bucket(index)
        return None if bucket is None else (self._store.put(bucket), bucket.digest, int(bucket.data.nbytes))

    def reside(self, parts: Sequence[str]) -> None:
        """Keeps these parts (``weights``, ``state``) in device memory, the others in host memory; not a collective.

        Publication needs the weights, everything else both.
        """
        self._engine.reside(parts)
        self._runner.reside(parts)

    def export(self, directory: Path) -> None:
        """Writes the model as plain transformers loads it (adapters merged), tokenizer included.

        An adapter lies beside it in ``adapter/`` in PEFT layout, a score normaliser in its own file.
        """
        if self._group.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
        self._group.barrier()
        self._exporter.write(directory)
        if self._group.rank == 0:
            load_tokenizer(self._config.model.path).save_pretrained(directory)
            if self._normaliser is not None:
                self._normaliser.write(directory)
        self._group.barrier()
