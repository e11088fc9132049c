"""One rank of training under DeepSpeed: any number of micro-batches, then one step, or none if a number is not finite.

What DeepSpeed does not do is done here: a loss or gradient that is not finite on any rank makes all ranks skip, in fp32
too; the learning rate belongs to the steps that were applied; a save holds the random state as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.background_write import BackgroundWrite
from actors.deepspeed.config import DeepSpeedConfig, OptimConfig, deepspeed_settings, learning_rate
from actors.deepspeed.layout import StateLayout
from actors.deepspeed.shards import RankState, SavedState
from actors.host_memory import HostMemory, module_tensors, storage_id, tensors_within
from actors.parts import LEARNER_PARTS
from actors.ranks import ProcessGroup
from rlhf.errors import CheckpointError, LearnerError, NonFiniteError
from rlhf.maths.packing import PackedBatch
from rlhf.runs.places import FileEntry, SaveStatus

MAX_SKIPS = 3


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        grad_norm: Global norm before clipping; infinite where the step was skipped.
        lr: Rate of the step.
        skipped: Whether the weights were left as they were.
        consecutive_skips: Skips up to now without a step between them.
    """

    grad_norm: float
    lr: float
    skipped: bool
    consecutive_skips: int


class TrainEngine:
    """Wraps a module whose ``forward`` takes a ``PackedBatch`` and options and returns a dict of tensors.

    Args:
        module: Its parameters that require gradients are trained.
        config: How DeepSpeed spreads it.
        optim: The optimizer.
        group: The gang's process group; ``initialize`` is a collective.
        dtype: ``"bfloat16"`` (with fp32 master weights) or ``"float32"``.
        total_steps: Optimizer steps in all, for the schedule.
    """

    def __init__(
        self,
        module: nn.Module,
        config: DeepSpeedConfig,
        optim: OptimConfig,
        *,
        group: ProcessGroup,
        dtype: str,
        total_steps: int,
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", group.device.type)
        if shutil.which("ninja") is None:  # DeepSpeed builds an extension at first use; ninja is beside the interpreter
            os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._config, self._optim, self._group = config, optim, group
        self._total_steps = total_steps
        self._check_here = dtype == "float32" and config.zero_stage == 0
        self.applied = 0
        self.skipped = 0
        self._consecutive = 0
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # The rate is 0 until the first step: DeepSpeed takes a step of its own to make some optimizers' state.
        optimizer = torch.optim.AdamW(
            trained, lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
        )
        settings = deepspeed_settings(config, dtype=dtype, max_grad_norm=optim.max_grad_norm)
        if config.zero_stage == 3:
            # DeepSpeed would first put the whole model on every device, where a large one has no room.
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(group.device)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=trained,
            config=settings,
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
        self._optimizer = optimizer
        optimizer.state.clear()
        if config.zero_stage == 0 and group.world_size == 1:
            # DeepSpeed would flatten all gradients and copy them back, to add them over one rank.
            self._engine.enable_backward_allreduce = False
        if dtype == "bfloat16" and config.zero_stage == 0:
            for parameter in trained:
                parameter.grad_dtype = torch.float32
        self._aside = {part: HostMemory(group.device.type) for part in sorted(LEARNER_PARTS)}
        self._resident = set(LEARNER_PARTS)
        self._background = BackgroundWrite()
        self._verified: tuple[str, SavedState] | None = None

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        module: nn.Module = self._engine.module
        return module

    @property
    def lr(self) -> float:
        """Rate of the next step."""
        return learning_rate(self._optim, self.applied, self._total_steps)

    def forward(self, batch: PackedBatch, options: dict[str, Any]) -> dict[str, Tensor]:
        """Runs the module in training mode; gradients as the caller's context says."""
        self._require("weights")
        outputs: dict[str, Tensor] = self._engine(batch, options)
        return outputs

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients; on leaving, training mode again."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient.

        Args:
            loss: This micro-batch's share: shares add up over micro-batches and ranks.
            last: Whether it is the last one before ``step``.
        """
        self._require(*LEARNER_PARTS)
        if not torch.isfinite(loss):
            # The gradient has to carry the news to all ranks, even where it would be finite itself.
            loss = loss * torch.nan
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; the loss is a share of the global mean.
        self._engine.backward(loss * self._group.world_size, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Applies the gradient, or skips where it is not finite; all ranks do the same.

        Raises:
            NonFiniteError: The third skip in a row.
        """
        self._require(*LEARNER_PARTS)
        lr = self.lr
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = lr
        norm = self._clip() if self._check_here else None
        if norm is not None and not torch.isfinite(norm):
            self._engine.zero_grad()
            applied, grad_norm = False, float("inf")
        else:
            self._engine.step()
            applied = bool(self._engine.was_step_applied())
            found = self._engine.get_global_grad_norm() if norm is None else norm
            grad_norm = float(found) if applied and found is not None else float("inf")
        self._consecutive = 0 if applied else self._consecutive + 1
        self.applied += applied
        self.skipped += not applied
        if self._consecutive >= MAX_SKIPS:
            raise NonFiniteError(
                f"learner rank {self._group.rank}",
                found=f"a loss or gradient that is not finite in {MAX_SKIPS} updates in a row",
                needed="finite numbers",
                action="The weights are unchanged. Look at the last batches. To lower optim.lr or use dtype: float32, "
                "set another run_dir: a run keeps both.",
            )
        return StepResult(grad_norm, lr, not applied, self._consecutive)

    def _clip(self) -> Tensor:
        """Global norm of the reduced gradients, scaled down to the limit; fp32 at stage 0 only."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, self._optim.max_grad_norm)

    @contextlib.contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """A context in which the parameters are whole on every rank; a collective at stage 3, free below it."""
        self._require("weights")
        if self._config.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield

    def save(self, place: str) -> dict[str, FileEntry]:
        """Writes this rank's fp32 weights, optimizer state, counters and random state; not a collective.

        Returns:
            What was written, by name.

        Raises:
            CheckpointError: The disk is full or refused.
        """
        self._background.wait()
        return self._state().write(place)

    def begin_save(self, place: str) -> None:
        """Copies what ``save`` writes to host memory; it is written while training goes on, see ``saved``.

        The copy takes 12 bytes of host memory for each number that this rank optimizes, until it is written.
        """
        self._background.wait()  # two copies at a time would be one too many
        state = self._state().snapshot()
        self._background.begin(lambda: state.write(place))

    def saved(self, wait_s: float = 0.0) -> SaveStatus:
        """What has come of ``begin_save``, after at most ``wait_s`` seconds."""
        return self._background.status(wait_s)

    def wait_for_writes(self) -> None:
        """Returns when no copy is being written, whatever came of it."""
        self._background.wait()

    def _layout(self) -> StateLayout:
        stage, rank = self._config.zero_stage, self._group.rank
        return StateLayout(self.module, self._engine.optimizer, self._optimizer, zero_stage=stage, rank=rank)

    def _state(self) -> RankState:
        self._require(*LEARNER_PARTS)
        counters = {
            "zero_stage": self._config.zero_stage,
            "applied": self.applied,
            "skipped": self.skipped,
            "consecutive": self._consecutive,
        }
        random = {"rng": torch.get_rng_state()}
        if self._group.device.type == "cuda":
            random["device_rng"] = torch.cuda.get_rng_state()
        return RankState.of(self._layout(), counters, random, self._group.rank, self._group.world_size)

    def verify(self, place: str, files: Mapping[str, FileEntry]) -> str:
        """Checks the bytes of every file that ``load`` will read on this rank; says what is wrong, or nothing.

        Files of a URL are kept for ``load``. Not a collective.
        """
        self._forget_verified()
        try:
            saved = SavedState(place, files)
            self._verified = (place, saved)
            saved.fetch(self._layout().fragments, self._group.rank)
        except CheckpointError as error:
            self._forget_verified()
            return error.found
        return ""

    def _forget_verified(self) -> None:
        if self._verified is not None:
            self._verified[1].close()
            self._verified = None

    def load(self, place: str) -> None:
        """Restores what ``save`` wrote, on any number of ranks and at any ZeRO stage, after ``verify``; a collective.

        On as many ranks as wrote it each goes on with its own random state. On another number each draws a new one
        from its seed and the steps that are done, so that no two ranks draw the same.

        Raises:
            CheckpointError: It was written by another model, or by other trained parts of it.
        """
        self._require(*LEARNER_PARTS)
        if self._verified is None or self._verified[0] != place:
            raise LearnerError(
                f"learner rank {self._group.rank}",
                found=f"a checkpoint in {place} that was not verified",
                needed="verify before load",
                action="This is a defect of the caller.",
            )
        saved = self._verified[1]
        saved.restore(self._layout())
        meta = next(iter(saved.meta.values()))
        self.applied, self.skipped, self._consecutive = meta["applied"], meta["skipped"], meta["consecutive"]
        if saved.world_size == self._group.world_size:
            random = saved.random_states(self._group.rank)
            torch.set_rng_state(random["rng"])
            if "device_rng" in random and self._group.device.type == "cuda":
                torch.cuda.set_rng_state(random["device_rng"])
        else:
            torch.manual_seed((torch.initial_seed() + 1_000_003 * (self.applied + 1)) % 2**63)
        self._forget_verified()

    def reside(self, parts: Collection[str]) -> None:
        """Keeps these of ``LEARNER_PARTS`` in device memory and puts the others aside in host memory, bit for bit.

        DeepSpeed's own ``offload_states`` knows neither stage 0 nor, at stage 3, PyTorch's AdamW. What is put aside
        here is found by storage: weights first, then whatever else the optimizer and its wrappers hold. Communication
        buffers and what a library allocates by itself stay on the device.
        """
        if self._config.zero_stage == 3 and not self._resident <= set(parts):
            self._engine.empty_partition_cache()
        weights = {storage_id(tensor) for tensor in module_tensors(self.module)}
        for part in sorted(LEARNER_PARTS):
            if part in parts:
                continue
            self._resident.discard(part)
            found = module_tensors(self.module) if part == "weights" else self._state_tensors()
            self._aside[part].park(t for t in found if part == "weights" or storage_id(t) not in weights)
        for part in sorted(LEARNER_PARTS):
            if part in parts:
                self._aside[part].restore()
                self._resident.add(part)

    def _state_tensors(self) -> Iterator[Tensor]:
        yield from tensors_within(self._optimizer)
        yield from tensors_within(self._engine.optimizer)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                yield parameter.grad

    def _require(self, *parts: str) -> None:
        lacking = [part for part in parts if part not in self._resident]
        if lacking:
            raise LearnerError(
                f"learner rank {self._group.rank}",
                found=f"{' and '.join(lacking)} in host memory",
                needed="them on the device",
                action="Hold the phase gate for the learner around this call.",
            )

    def close(self) -> None:
        """Removes DeepSpeed's hooks, after a write that goes on."""
        self._background.close()
        self._forget_verified()
        self._engine.destroy()
