"""Which part of which parameter this rank optimizes, whatever DeepSpeed has made of it.

Every ZeRO stage keeps fp32 weights and AdamW's two means in tensors of its own: one a parameter, or many parameters in
a row and of those one piece a rank. A fragment says where in them a piece of a named parameter lies. That is all that a
checkpoint needs to hold the state by name, and to give it to another number of ranks or another stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MEANS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of one parameter that this rank holds in fp32.

    Attributes:
        name: Of the parameter.
        shape: Of the whole parameter.
        start: Where the piece begins in the flattened parameter.
        numel: Numbers in it.
        owner: The tensor that the optimizer steps.
        offset: Where the piece begins in the flattened owner.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    owner: Tensor
    offset: int

    @property
    def end(self) -> int:
        """Where the piece ends in the flattened parameter."""
        return self.start + self.numel

    def part_of(self, flat: Tensor) -> Tensor:
        """This piece [numel] of a tensor that is laid out as the owner is; a view."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


class StateLayout:
    """The optimizer's state of one rank, by fragments.

    Args:
        module: Names the parameters.
        wrapped: What DeepSpeed has made of the optimizer.
        optimizer: PyTorch's AdamW inside it.
        zero_stage: How DeepSpeed spreads the state.
        rank: This rank.
    """

    def __init__(
        self, module: nn.Module, wrapped: Any, optimizer: torch.optim.Optimizer, *, zero_stage: int, rank: int
    ) -> None:
        self._wrapped, self._optimizer, self._stage = wrapped, optimizer, zero_stage
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        find = {0: self._whole, 3: self._partitions}.get(zero_stage, self._slices)
        self.fragments = list(find(names, rank))

    def _whole(self, names: dict[int, str], rank: int) -> Iterator[Fragment]:
        """Stage 0: every rank has all of it; in bf16 DeepSpeed keeps fp32 copies beside the weights."""
        for weight, master in self._masters():
            yield Fragment(names[id(weight)], tuple(weight.shape), 0, weight.numel(), master, 0)

    def _masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Stage 0: (weight, fp32 weight); in fp32 they are the same."""
        if self._wrapped is self._optimizer:
            for group in self._optimizer.param_groups:
                yield from ((weight, weight) for weight in group["params"])
            return
        for weights, masters in zip(self._wrapped.fp16_groups, self._wrapped.fp32_groups, strict=True):
            yield from zip(weights, masters, strict=True)

    def _slices(self, names: dict[int, str], rank: int) -> Iterator[Fragment]:
        """Stages 1 and 2: all parameters in a row, cut into equal slices wherever that is."""
        is_bf16 = hasattr(self._wrapped, "bf16_groups")
        groups = self._wrapped.bf16_groups if is_bf16 else self._wrapped.bit16_groups
        owners = self._wrapped.fp32_groups_flat_partition if is_bf16 else self._wrapped.single_partition_of_fp32_groups
        for weights, owner in zip(groups, owners, strict=True):
            for weight in weights:
                if (piece := weight._hp_mapping) is not None:
                    inside, outside = piece.lp_fragment_address, piece.hp_fragment_address
                    shape = tuple(weight.shape)
                    yield Fragment(names[id(weight)], shape, inside.start, inside.numel, owner, outside.start)

    def _partitions(self, names: dict[int, str], rank: int) -> Iterator[Fragment]:
        """Stage 3: each parameter cut into equal pieces, the last ones padded."""
        wrapped = self._wrapped
        for weights in wrapped.fp16_groups:
            for weight in weights:
                group, offset, length = wrapped.grad_position[wrapped.get_param_id(weight)]
                start = min(rank * length, weight.ds_numel)
                numel = min(length, weight.ds_numel - start)
                if numel > 0:
                    owner = wrapped.fp32_partitioned_groups_flat[group]
                    yield Fragment(names[id(weight)], tuple(weight.ds_shape), start, numel, owner, offset)

    def share(self, rank: int, world_size: int) -> list[Fragment]:
        """What this rank writes: where all ranks hold everything, each takes about as many numbers as the others."""
        if self._stage > 0:
            return self.fragments
        total = sum(fragment.numel for fragment in self.fragments)
        chosen, before = [], 0
        for fragment in self.fragments:
            if (2 * before + fragment.numel) * world_size // (2 * total) == rank:
                chosen.append(fragment)
            before += fragment.numel
        return chosen

    def step_of(self, fragment: Fragment) -> float | None:
        """Steps that the optimizer has counted for a fragment; None where it has taken none yet."""
        state = self._optimizer.state.get(fragment.owner)
        return float(state["step"]) if state else None

    def tensors_of(self, fragment: Fragment) -> dict[str, Tensor]:
        """Views of a fragment's fp32 weights, and of its means where the optimizer has taken a step."""
        state = self._optimizer.state.get(fragment.owner)
        found = {"master": fragment.part_of(fragment.owner)}
        return found | ({mean: fragment.part_of(state[mean]) for mean in MEANS} if state else {})

    def prepare(self, steps: Sequence[float | None]) -> None:
        """Makes or removes the optimizer's state, for the ``steps`` of the fragments, in their order.

        Means are zero until they are written to. Fragments that share an owner share its count.
        """
        counts: dict[int, float] = {}
        owners = {id(fragment.owner): fragment.owner for fragment in self.fragments}
        for fragment, step in zip(self.fragments, steps, strict=True):
            if step is not None:
                counts[id(fragment.owner)] = max(step, counts.get(id(fragment.owner), 0.0))
        for key, owner in owners.items():
            if key not in counts:
                self._optimizer.state.pop(owner, None)
                continue
            state = self._optimizer.state[owner]
            state["step"] = torch.tensor(counts[key], dtype=torch.float32, device=owner.device)
            for mean in MEANS:
                state[mean] = torch.zeros_like(owner.detach())
        if self._stage == 3:
            self._wrapped.checkpoint_event_prologue()

    def take_over(self) -> None:
        """Gives the weights that the model computes with the values of the fp32 ones; a collective."""
        with torch.no_grad():
            if self._stage == 0:
                for weight, master in self._masters():
                    if weight is not master:
                        weight.copy_(master)
            elif self._stage == 3:
                for number in range(len(self._wrapped.fp32_partitioned_groups_flat)):
                    self._wrapped._reassign_or_swap_out_partitioned_parameters(number)
                self._wrapped.checkpoint_event_epilogue()
            else:
                self._wrapped.update_lp_params()
