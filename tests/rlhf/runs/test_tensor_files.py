"""Files that are written a piece at a time are the library's own, bit for bit in what it reads from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.runs import tensor_files
from rlhf.runs.places import write_file
from rlhf.runs.tensor_files import tensor_file_chunks


def test_the_library_reads_every_type_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(7, 11, generator=generator)
    tensors = {
        "odd bytes": torch.arange(13, dtype=torch.uint8),
        "wide": numbers.double(),
        "plain": numbers,
        "half": numbers.bfloat16(),
        "other half": numbers.half(),
        "counts": torch.arange(5),
        "small counts": torch.arange(5, dtype=torch.int32),
        "view": numbers.view(-1)[3:20],
        "not in a row": numbers.t(),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0),
        "trained": torch.nn.Parameter(numbers.clone()),
    }
    entry = write_file(str(tmp_path), "a.safetensors", tensor_file_chunks(tensors))
    assert entry.size == (tmp_path / "a.safetensors").stat().st_size
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    one, other = torch.randn(5), torch.randn(3)
    entries = [
        write_file(str(tmp_path), name, tensor_file_chunks(tensors))
        for name, tensors in {"a": {"x": one, "y": other}, "b": {"y": other, "x": one}}.items()
    ]
    assert entries[0] == entries[1]


def test_an_unknown_type_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="flags of torch.bool"):
        next(tensor_file_chunks({"flags": torch.zeros(2, dtype=torch.bool)}))
