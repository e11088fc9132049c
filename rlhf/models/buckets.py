"""A saved model as weight buckets: how a running engine takes the weights of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from rlhf.errors import ConfigError
from rlhf.weights import Bucket, make_bucket, plan_buckets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def folder_buckets(folder: Path, bucket_bytes: int, dtype: str) -> Iterator[Bucket]:
    """Reads a Hugging Face folder bucket by bucket; no more than one bucket is in memory at a time.

    Args:
        folder: Holds ``*.safetensors``.
        bucket_bytes: Largest bucket; a larger single tensor goes alone.
        dtype: Name of what the tensors are cast to.

    Raises:
        ConfigError: The folder holds no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            str(folder), found="no *.safetensors", needed="a saved model", action="Check the path, or export it again."
        )
    sizes: dict[str, int] = {}
    owner: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                shape = tensors.get_slice(name).get_shape()
                sizes[name] = torch.Size(shape).numel() * DTYPES[dtype].itemsize
                owner[name] = file
    plan = plan_buckets(sizes, bucket_bytes)
    for index, names in enumerate(plan):
        yield make_bucket(index, len(plan), {name: _read(owner[name], name).to(DTYPES[dtype]) for name in names})


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor
