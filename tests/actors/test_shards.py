"""A learner's state by parameter name: cut for any number of ranks, put together again bit for bit.

Without DeepSpeed: stage 0 in fp32 is PyTorch's own optimizer, and stage 3's layout is imitated. The real ones are in
``test_learner.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from actors.deepspeed.layout import MEANS, StateLayout
from actors.deepspeed.shards import RankState, SavedState
from rlhf.errors import CheckpointError
from rlhf.runs.places import FileEntry

COUNTERS = {"zero_stage": 0, "applied": 3, "skipped": 0, "consecutive": 0}


def trained(steps: int = 3, *, seed: int = 0, width: int = 5) -> tuple[nn.Module, torch.optim.AdamW]:
    """A small module, one of whose parameters never has a gradient."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    module.unused = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(7, 3)).square().mean().backward()
        optimizer.step()
    return module, optimizer


def layout_of(module: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> StateLayout:
    return StateLayout(module, optimizer, optimizer, zero_stage=0, rank=rank)


class Partitioned:
    """What DeepSpeed makes of an optimizer at stage 3, on one of several ranks: padded pieces in a row, two groups."""

    def __init__(self, module: nn.Module, rank: int, world_size: int) -> None:
        weights = list(module.parameters())
        self.fp16_groups = [weights[:2], weights[2:]]
        self.grad_position: dict[int, tuple[int, int, int]] = {}
        self.fp32_partitioned_groups_flat = []
        for group, members in enumerate(self.fp16_groups):
            pieces, offset = [], 0
            for weight in members:
                weight.ds_numel, weight.ds_shape = weight.numel(), weight.shape
                length = -(-weight.numel() // world_size)
                padded = torch.full((length * world_size,), torch.nan)
                padded[: weight.numel()] = weight.detach().view(-1)
                pieces.append(padded[rank * length : (rank + 1) * length])
                self.grad_position[id(weight)] = (group, offset, length)
                offset += length
            self.fp32_partitioned_groups_flat.append(torch.cat(pieces))
        self.calls: list[str] = []

    def get_param_id(self, weight: nn.Parameter) -> int:
        return id(weight)

    def checkpoint_event_prologue(self) -> None:
        self.calls.append("prologue")

    def _reassign_or_swap_out_partitioned_parameters(self, group: int) -> None:
        self.calls.append(f"group {group}")

    def checkpoint_event_epilogue(self) -> None:
        self.calls.append("epilogue")


def partitioned(rank: int, world_size: int) -> tuple[StateLayout, Partitioned, Any]:
    """A fresh rank of stage 3."""
    module, _ = trained(0, seed=9)
    wrapped = Partitioned(module, rank, world_size)
    optimizer: Any = SimpleNamespace(state={})
    optimizer.state = _StateOfOwners()
    return StateLayout(module, wrapped, optimizer, zero_stage=3, rank=rank), wrapped, optimizer


class _StateOfOwners(dict):
    def __missing__(self, owner: Any) -> dict[str, Any]:
        self[owner] = {}
        return self[owner]


def write_all(layouts: list[StateLayout], place: Path) -> dict[str, FileEntry]:
    files: dict[str, FileEntry] = {}
    for rank, layout in enumerate(layouts):
        random = {"rng": torch.tensor([rank], dtype=torch.uint8)}
        files |= RankState.of(layout, COUNTERS, random, rank, len(layouts)).write(str(place))
    return files


def tensors_of(layouts: list[StateLayout]) -> dict[str, torch.Tensor]:
    """Everything whole, by name; what no rank has stays NaN."""
    whole: dict[str, torch.Tensor] = {}
    for layout in layouts:
        for fragment in layout.fragments:
            for kind, tensor in layout.tensors_of(fragment).items():
                shape = torch.Size(fragment.shape)
                flat = whole.setdefault(f"{kind}/{fragment.name}", torch.full((shape.numel(),), torch.nan))
                flat[fragment.start : fragment.end] = tensor
    return whole


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("num_writers", [1, 2, 3, 9])
def test_ranks_that_all_hold_everything_write_each_parameter_once(tmp_path: Path, num_writers: int) -> None:
    module, optimizer = trained()
    layouts = [layout_of(module, optimizer, rank) for rank in range(num_writers)]
    written = [f.name for rank, layout in enumerate(layouts) for f in layout.share(rank, num_writers)]
    assert sorted(written) == sorted(name for name, _ in module.named_parameters())
    files = write_all(layouts, tmp_path)

    other, fresh = trained(1, seed=5)
    target = layout_of(other, fresh)
    saved = SavedState(str(tmp_path), files)
    saved.fetch(target.fragments, 0)
    saved.restore(target)
    assert_same(tensors_of([target]), tensors_of([layout_of(module, optimizer)]))
    assert other.unused not in fresh.state, "what had no gradient has taken no step"
    assert all(float(fresh.state[weight]["step"]) == 3 for weight in other.parameters() if weight is not other.unused)
    assert saved.random_states(0)["rng"].tolist() == [0]


@pytest.mark.parametrize("num_readers", [1, 2, 3])
def test_pieces_are_cut_anew_and_padding_stays_out(tmp_path: Path, num_readers: int) -> None:
    module, optimizer = trained()
    before = tensors_of([layout_of(module, optimizer)])
    files = write_all([layout_of(module, optimizer, rank) for rank in range(2)], tmp_path / "whole")
    cut = [partitioned(rank, num_readers) for rank in range(num_readers)]
    for rank, (layout, wrapped, _) in enumerate(cut):
        saved = SavedState(str(tmp_path / "whole"), files)
        saved.fetch(layout.fragments, rank)
        saved.restore(layout)
        assert wrapped.calls == ["prologue", "group 0", "group 1", "epilogue"]
    layouts = [layout for layout, _, _ in cut]
    found = tensors_of(layouts)
    unused = {f"{mean}/unused" for mean in MEANS}
    assert found.keys() - before.keys() == unused, "it shares the count of those beside it"
    assert all(not found.pop(name).any() for name in unused)
    assert_same(found, before)

    again = write_all(layouts, tmp_path / "cut")
    other, fresh = trained(0, seed=3)
    target = layout_of(other, fresh)
    saved = SavedState(str(tmp_path / "cut"), again)
    saved.fetch(target.fragments, 0)
    saved.restore(target)
    assert_same({name: t for name, t in tensors_of([target]).items() if name not in unused}, before)


def test_a_rank_reads_what_it_needs(tmp_path: Path) -> None:
    module, optimizer = trained()
    source = [partitioned(rank, 2)[0] for rank in range(2)]
    files = write_all(source, tmp_path)
    (tmp_path / "rank_0.safetensors").write_bytes(b"other")
    layout, _, _ = partitioned(1, 2)
    SavedState(str(tmp_path), files).fetch(layout.fragments, 1)
    with pytest.raises(CheckpointError, match="rank_0.safetensors of 5 bytes"):
        SavedState(str(tmp_path), files).fetch(layout_of(module, optimizer).fragments, 0)


def test_a_url_is_read_through_copies_that_go_away(tmp_path: Path) -> None:
    module, optimizer = trained()
    files = write_all([layout_of(module, optimizer)], tmp_path)
    other, fresh = trained(0, seed=5)
    target = layout_of(other, fresh)
    saved = SavedState(f"file://{tmp_path}", files)
    saved.fetch(target.fragments, 0)
    [copy] = saved._fetched.values()
    assert copy.is_file() and tmp_path not in copy.parents
    saved.restore(target)
    saved.close()
    assert not copy.exists()
    assert_same(tensors_of([target]), tensors_of([layout_of(module, optimizer)]))


def test_a_snapshot_stays_as_it_was(tmp_path: Path) -> None:
    module, optimizer = trained()
    live = RankState.of(layout_of(module, optimizer), COUNTERS, {}, 0, 1)
    at_once = live.write(str(tmp_path / "at once"))
    copy = live.snapshot()
    module(torch.randn(7, 3)).square().mean().backward()
    optimizer.step()
    assert copy.write(str(tmp_path / "copied")) == at_once
    assert live.write(str(tmp_path / "late")) != at_once


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    module, optimizer = trained()
    files = write_all([layout_of(module, optimizer)], tmp_path)
    for other, fresh in (trained(1, width=6), _with_another_parameter()):
        target = layout_of(other, fresh)
        before = {name: tensor.clone() for name, tensor in tensors_of([target]).items()}
        saved = SavedState(str(tmp_path), files)
        saved.fetch(target.fragments, 0)
        with pytest.raises(CheckpointError, match="the trained parts of it, that wrote it"):
            saved.restore(target)
        assert_same(tensors_of([target]), before)


def _with_another_parameter() -> tuple[nn.Module, torch.optim.AdamW]:
    module, _ = trained(0)
    module.more = nn.Parameter(torch.zeros(2))
    return module, torch.optim.AdamW(module.parameters())


def test_the_files_of_all_ranks_are_needed(tmp_path: Path) -> None:
    module, optimizer = trained()
    files = write_all([layout_of(module, optimizer, rank) for rank in range(2)], tmp_path)
    with pytest.raises(CheckpointError, match="the state of 1 ranks"):
        SavedState(str(tmp_path), {name: entry for name, entry in files.items() if "rank_0" in name})
    with pytest.raises(CheckpointError, match="no state of a learner"):
        SavedState(str(tmp_path), {})
    meta = json.loads((tmp_path / "rank_1.json").read_text())
    assert meta["world_size"] == 2 and meta["applied"] == 3
    (tmp_path / "rank_1.json").write_text(json.dumps(meta | {"applied": 4}))
    with pytest.raises(CheckpointError, match="rank_1.json with altered bytes"):
        SavedState(str(tmp_path), files)
