"""What one rank writes into a checkpoint, and how any number of ranks read it.

Two files a rank: ``rank_0.safetensors`` with the fp32 weights, AdamW's two means and the random state, and
``rank_0.json``, which says which piece of which parameter each tensor is, and has the counters. No pickle anywhere.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.deepspeed.layout import MEANS, Fragment, StateLayout
from rlhf.errors import CheckpointError
from rlhf.runs.places import FileEntry, fetch_file, is_url, not_saved, write_file
from rlhf.runs.tensor_files import tensor_file_chunks

FORMAT = 2
RANDOM_STATES = ("rng", "device_rng")
_SHARD = re.compile(r"^rank_(\d+)\.json$")


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank's part of a checkpoint.

    Attributes:
        rank: Names its files.
        meta: Counters, and the fragments without their numbers; plain JSON.
        tensors: By name in the file: live ones, or those of a snapshot.
    """

    rank: int
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, layout: StateLayout, counters: Mapping[str, Any], random: Mapping[str, Tensor], rank: int, world_size: int
    ) -> RankState:
        """What a rank has to write, as it is now: views of live tensors."""
        fragments = layout.share(rank, world_size)
        tensors = dict(random)
        for fragment in fragments:
            tensors |= {f"{kind}/{fragment.name}": t for kind, t in layout.tensors_of(fragment).items()}
        described = [
            {
                "name": fragment.name,
                "shape": list(fragment.shape),
                "start": fragment.start,
                "numel": fragment.numel,
                "step": layout.step_of(fragment),
            }
            for fragment in fragments
        ]
        return cls(rank, {"format": FORMAT, "world_size": world_size, **counters, "fragments": described}, tensors)

    def snapshot(self) -> RankState:
        """A copy in host memory, which training does not touch; in pinned memory where it comes from a device."""
        copies: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            on_device = tensor.device.type == "cuda"
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
            copies[name].copy_(tensor.detach(), non_blocking=on_device)
        if any(tensor.device.type == "cuda" for tensor in self.tensors.values()):
            torch.cuda.synchronize()
        return RankState(self.rank, self.meta, copies)

    def write(self, place: str) -> dict[str, FileEntry]:
        """Writes this rank's files and says what they are.

        Raises:
            CheckpointError: The disk is full or refused.
        """
        text = json.dumps(self.meta, allow_nan=False).encode()
        try:
            return {
                f"rank_{self.rank}.safetensors": write_file(
                    place, f"rank_{self.rank}.safetensors", tensor_file_chunks(self.tensors)
                ),
                f"rank_{self.rank}.json": write_file(place, f"rank_{self.rank}.json", [text]),
            }
        except OSError as error:
            raise not_saved(place, error) from error


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a fragment was saved."""

    shard: int
    start: int
    numel: int
    shape: tuple[int, ...]
    step: float | None

    @property
    def end(self) -> int:
        return self.start + self.numel


class SavedState:
    """A checkpoint as one rank reads it: all descriptions, and of the tensors the shards that it needs.

    Whatever is read is verified first. The files of a URL are copied into a temporary folder, until ``close``.

    Args:
        place: Folder or URL.
        files: What the manifest says of each file in it.

    Raises:
        CheckpointError: A file is not as the manifest says.
    """

    def __init__(self, place: str, files: Mapping[str, FileEntry]) -> None:
        self._place, self._files = place, files
        self._scratch = tempfile.TemporaryDirectory(prefix="rlhf-checkpoint-") if is_url(place) else None
        self._fetched: dict[int, Path] = {}
        shards = sorted(int(match[1]) for name in files if (match := _SHARD.match(name)))
        if not shards:
            raise self.mismatch("no state of a learner", "rank_0.json and the files beside it")
        self.meta = {shard: json.loads(self._fetch(f"rank_{shard}.json").read_bytes()) for shard in shards}
        if len(shards) != (world := self.meta[shards[0]]["world_size"]):
            raise self.mismatch(f"the state of {len(shards)} ranks", f"that of all {world} which wrote it")
        self._pieces: dict[str, list[_Piece]] = {}
        for shard, meta in self.meta.items():
            for one in meta["fragments"]:
                piece = _Piece(shard, one["start"], one["numel"], tuple(one["shape"]), one["step"])
                self._pieces.setdefault(one["name"], []).append(piece)

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return len(self.meta)

    def fetch(self, fragments: Sequence[Fragment], rank: int) -> None:
        """Verifies the shards that hold these fragments, and the one of this rank's own number."""
        needed = {piece.shard for fragment in fragments for piece in self._pieces_of(fragment)}
        for shard in sorted(needed | ({rank} & set(self.meta))):
            self._fetched[shard] = self._fetch(f"rank_{shard}.safetensors")

    def _fetch(self, name: str) -> Path:
        if name not in self._files:
            raise self.mismatch(f"no {name}", "it in the manifest")
        return fetch_file(self._place, name, self._files[name], Path(self._scratch.name) if self._scratch else None)

    def _pieces_of(self, fragment: Fragment) -> list[_Piece]:
        found = self._pieces.get(fragment.name, [])
        return [piece for piece in found if piece.start < fragment.end and fragment.start < piece.end]

    def restore(self, layout: StateLayout) -> None:
        """Writes the saved numbers into a rank's tensors, and its weights after them; a collective.

        Raises:
            CheckpointError: It is not of this model, or not of the parts of it that are trained; nothing has changed.
        """
        self._check(layout.fragments)
        layout.prepare([self._step_of(fragment) for fragment in layout.fragments])
        targets = [(fragment, layout.tensors_of(fragment)) for fragment in layout.fragments]
        with torch.no_grad():
            for shard, path in self._fetched.items():
                self._copy_from(shard, path, targets)
        layout.take_over()

    def _step_of(self, fragment: Fragment) -> float | None:
        return max((p.step for p in self._pieces_of(fragment) if p.step is not None), default=None)

    def _copy_from(self, shard: int, path: Path, targets: Sequence[tuple[Fragment, Mapping[str, Tensor]]]) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as saved:
            for fragment, tensors in targets:
                for piece in self._pieces_of(fragment):
                    if piece.shard != shard:
                        continue
                    begin, end = max(piece.start, fragment.start), min(piece.end, fragment.end)
                    for kind in ("master", *(MEANS if piece.step is not None else ())):
                        source = saved.get_slice(f"{kind}/{fragment.name}")[begin - piece.start : end - piece.start]
                        tensors[kind][begin - fragment.start : end - fragment.start].copy_(source)

    def _check(self, fragments: Sequence[Fragment]) -> None:
        for fragment in fragments:
            pieces = self._pieces_of(fragment)
            if any(piece.shape != fragment.shape for piece in pieces):
                raise self.mismatch(f"{fragment.name} of shape {pieces[0].shape}", f"{fragment.shape}")
            covered = sum(min(piece.end, fragment.end) - max(piece.start, fragment.start) for piece in pieces)
            if covered != fragment.numel:
                raise self.mismatch(f"{covered} numbers of {fragment.name}", f"{fragment.numel}")
            if lacking := {piece.shard for piece in pieces} - set(self._fetched):
                raise self.mismatch(f"shards {sorted(lacking)} that were not verified", "fetch before restore")

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """The random states that the rank of this number had."""
        from safetensors import safe_open

        with safe_open(self._fetched[rank], framework="pt") as saved:
            names = set(saved.keys())
            return {name: saved.get_tensor(name) for name in RANDOM_STATES if name in names}

    def close(self) -> None:
        """Removes the copies of a URL's files."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def mismatch(self, found: str, needed: str) -> CheckpointError:
        """The error for a state that this learner cannot take."""
        return CheckpointError(
            f"learner state {self._place}",
            found=found,
            needed=needed,
            action="Resume with the model, and the trained parts of it, that wrote it.",
        )
