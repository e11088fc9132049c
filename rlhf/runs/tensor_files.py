"""Tensors on their way into a safetensors file, a piece at a time.

The library's own writer first turns every tensor into bytes in memory, and hands the file out only when it is written;
here each byte goes from the tensor to the stream, to be hashed on the way. What is written is the library's format
(https://github.com/huggingface/safetensors#format), and the library reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rlhf.runs.places import CHUNK_BYTES

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_ALIGNMENT = 8


def tensor_file_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file.

    Args:
        tensors: By name, in any order and on any device; one at a time is copied to the host where it is not there.

    Raises:
        ValueError: A tensor has a type that the file does not know.
    """
    if unknown := [f"{name} of {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _NAMES]:
        raise ValueError(f"tensors of the types {sorted(map(str, _NAMES))} instead of {unknown[0]}")
    # Wide types first, so that each tensor begins at a multiple of its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        if flat.numel():
            data = flat.view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]
