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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.deepspeed.config import DeepSpeedConfig, OptimConfig, deepspeed_settings, learning_rate
from actors.host_memory import HostMemory, module_tensors, storage_id, tensors_within
from actors.parts import LEARNER_PARTS
from actors.ranks import ProcessGroup
from rlhf.errors import CheckpointError, LearnerError, NonFiniteError
from rlhf.maths.packing import PackedBatch

TAG = "engine"
MAX_SKIPS = 3
RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


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

    def save(self, directory: Path) -> None:
        """Writes this rank's weights, optimizer, counters and random state under an existing directory; a collective.

        Files are written in place: the caller makes the directory temporary and renames it.
        """
        self._require(*LEARNER_PARTS)
        self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        for script in RECOVERY_SCRIPTS:
            (directory / script).unlink(missing_ok=True)
        state = {
            "world_size": self._group.world_size,
            "zero_stage": self._config.zero_stage,
            "applied": self.applied,
            "skipped": self.skipped,
            "consecutive": self._consecutive,
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if self._group.device.type == "cuda" else None,
        }
        torch.save(state, directory / f"rank_{self._group.rank}.pt")
        self._group.barrier()

    def load(self, directory: Path) -> None:
        """Restores what ``save`` wrote, from a directory whose manifest has been verified; a collective.

        Raises:
            CheckpointError: It was written by another number of ranks or at another ZeRO stage.
        """
        self._require(*LEARNER_PARTS)
        path = directory / f"rank_{self._group.rank}.pt"
        if not path.is_file():
            raise _mismatch(directory, f"no {path.name}", f"the state of {self._group.world_size} ranks")
        state = torch.load(path, weights_only=True, map_location="cpu")
        found = (state["world_size"], state["zero_stage"])
        wanted = (self._group.world_size, self._config.zero_stage)
        if found != wanted:
            raise _mismatch(directory, *(f"{ranks} ranks at ZeRO stage {stage}" for ranks, stage in (found, wanted)))
        loaded, _ = self._engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)
        if loaded is None:
            raise _mismatch(directory, "no engine state", "the folder that save wrote")
        self.applied, self.skipped, self._consecutive = state["applied"], state["skipped"], state["consecutive"]
        torch.set_rng_state(state["rng"])
        if state["device_rng"] is not None:
            torch.cuda.set_rng_state(state["device_rng"])

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
        """Removes DeepSpeed's hooks."""
        self._engine.destroy()


def _mismatch(directory: Path, found: str, needed: str) -> CheckpointError:
    return CheckpointError(
        f"learner state {directory}",
        found=found,
        needed=needed,
        action="Resume with the ranks and the ZeRO stage that wrote it.",
    )
