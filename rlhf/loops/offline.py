"""The offline loop: one objective over a data set. Supervised, reward-model and preference training are this loop.

It runs inside each learner rank, all ranks in step: every rank holds the whole list of groups and
takes its own share of each batch, so batches do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import Field

from rlhf.config import StrictModel
from rlhf.errors import ConfigError, NonFiniteError
from rlhf.types import TrainGroup


class OfflineConfig(StrictModel):
    """How the offline loop steps."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training groups."""
    groups_per_step: int = Field(default=32, ge=1)
    """Groups (a prompt with its completions) in one update, over all ranks."""
    evaluate_every: int = Field(default=0, ge=0)
    """Updates between evaluations on the held-out groups; 0: only at the end."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Updates between checkpoints."""


class OfflineLearner(Protocol):
    """One rank of a learner, as the offline loop sees it. Calls are collective: all ranks make them together."""

    def train_step(self, groups: Sequence[TrainGroup]) -> Mapping[str, float]:
        """One update on this rank's share; metrics are reduced over ranks."""
        ...

    def evaluate(self, groups: Sequence[TrainGroup]) -> Mapping[str, float]:
        """The objective's metrics without an update."""
        ...


@dataclass(frozen=True, slots=True)
class OfflineHooks:
    """What happens between steps. ``log`` acts on rank 0; ``checkpoint`` is collective; ``should_stop`` must agree.

    ``log`` is given the step, its metrics, and the uids of its batch over all ranks, so that a batch that was skipped
    can be found again.
    """

    log: Callable[[int, Mapping[str, float], Sequence[str]], None]
    checkpoint: Callable[[int], None]
    should_stop: Callable[[], bool]


def epoch_batches(num_groups: int, groups_per_step: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffles an epoch's group indices and cuts them into batches of nearly equal size, none dropped.

    Returns:
        ``ceil(num_groups / groups_per_step)`` integer arrays that together hold each index once.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_groups)
    return np.array_split(order, -(-num_groups // groups_per_step))


def num_steps(num_groups: int, config: OfflineConfig) -> int:
    """Updates in all."""
    return config.epochs * -(-num_groups // config.groups_per_step)


def check_batches(num_groups: int, config: OfflineConfig, num_ranks: int, where: str) -> None:
    """Raises ``ConfigError`` unless every rank gets at least one group of every batch."""
    if num_groups == 0:
        raise ConfigError(where, found="no training groups", needed="at least one", action="Check the data.")
    smallest = num_groups // -(-num_groups // config.groups_per_step)
    if smallest < num_ranks:
        raise ConfigError(
            where,
            found=f"batches of {smallest} groups for {num_ranks} ranks",
            needed="at least one group a rank",
            action="Raise groups_per_step or lower the number of ranks.",
        )


def check_first_step(first_step: int, num_steps: int, where: str) -> None:
    """Raises ``ConfigError`` where a checkpoint is behind the last step: the result would not be what it says."""
    if first_step > num_steps:
        raise ConfigError(
            where,
            found=f"{num_steps} steps, and a checkpoint of step {first_step}",
            needed="no fewer steps than are done",
            action="Put epochs back, or set another run_dir.",
        )


def tokens_from(groups: Sequence[TrainGroup], config: OfflineConfig, *, seed: int, first_step: int) -> int:
    """Tokens, over all ranks, of the updates from ``first_step`` to the end."""
    lengths = np.array([group.num_tokens for group in groups])
    batches = [
        batch
        for epoch in range(config.epochs)
        for batch in epoch_batches(len(groups), config.groups_per_step, seed=seed, epoch=epoch)
    ]
    return sum(int(lengths[batch].sum()) for batch in batches[first_step:])


def train_offline(
    learner: OfflineLearner,
    groups: Sequence[TrainGroup],
    held_out: Sequence[TrainGroup],
    config: OfflineConfig,
    hooks: OfflineHooks,
    *,
    rank: int,
    num_ranks: int,
    seed: int,
    first_step: int = 0,
) -> int:
    """Trains from ``first_step`` to the end and returns the number of updates done (fewer after a stop).

    Raises:
        NonFiniteError: Too many updates in a row were not finite; the last of them has been logged.
    """
    last = num_steps(len(groups), config)
    step = 0
    for epoch in range(config.epochs):
        for batch in epoch_batches(len(groups), config.groups_per_step, seed=seed, epoch=epoch):
            step += 1
            if step <= first_step:
                continue
            share = [groups[i] for i in batch[rank::num_ranks]]
            uids = [groups[i].uid for i in batch]
            try:
                metrics = dict(learner.train_step(share))
            except NonFiniteError:  # the batch that ends the run is looked for first
                hooks.log(step, {"skipped": 1.0}, uids)
                raise
            if held_out and (step == last or (config.evaluate_every and step % config.evaluate_every == 0)):
                found = learner.evaluate(held_out[rank::num_ranks])
                metrics |= {f"held_out/{name}": value for name, value in found.items()}
            hooks.log(step, metrics, uids)
            stop = hooks.should_stop()
            if stop or step == last or step % config.checkpoint_every == 0:
                hooks.checkpoint(step)
            if stop:
                return step
    return last
