"""Weights on their way from learner to engines: buckets of named tensors with a digest.

A bucket holds whole tensors back to back in one byte array, so that it travels through the object store without being
serialised tensor by tensor. Names are those of the Hugging Face checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import PublicationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes that weights travel in, by torch's name, and the bytes of one number."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some of a model's tensors, all of one dtype.

    Attributes:
        index: Place in the sequence of buckets, from 0.
        count: How many buckets make the whole model.
        names: Hugging Face parameter names.
        shapes: One shape per name.
        dtype: Name of the torch dtype, for example ``"bfloat16"``.
        data: The tensors' bytes back to back, in the order of ``names``. [bytes] uint8
        digest: BLAKE2b over place, names, shapes, dtype and the digest of each tensor's bytes, in hexadecimal.
    """

    index: int
    count: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    data: NDArray[np.uint8]
    digest: str


def plan_buckets(sizes: Mapping[str, int], bucket_bytes: int) -> list[list[str]]:
    """Splits parameters into buckets in their given order.

    Args:
        sizes: Bytes of each parameter, by name.
        bucket_bytes: Most bytes in a bucket; a larger parameter gets a bucket of its own.

    Returns:
        The names in each bucket; no bucket is empty.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it has to be positive")
    buckets: list[list[str]] = []
    free = 0
    for name, size in sizes.items():
        if not buckets or size > free:
            buckets.append([])
            free = bucket_bytes
        buckets[-1].append(name)
        free -= size
    return buckets


def make_bucket(index: int, count: int, tensors: Mapping[str, Tensor]) -> Bucket:
    """Copies tensors of one dtype into a bucket; the tensors may live on any device.

    Args:
        index: Place in the sequence, from 0.
        count: How many buckets make the whole model.
        tensors: By Hugging Face name, already cast to the engine's dtype.

    Returns:
        The bucket with its digest.
    """
    import torch

    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= ITEM_BYTES.keys():
        raise ValueError(f"a bucket holds tensors of one dtype out of {sorted(ITEM_BYTES)}, not {sorted(dtypes)}")
    data = np.empty(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), dtype=np.uint8)
    view = torch.from_numpy(data)
    start = 0
    for tensor in tensors.values():
        end = start + tensor.numel() * tensor.element_size()
        view[start:end].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        start = end
    names = tuple(tensors)
    shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
    dtype = dtypes.pop()
    bucket = Bucket(index, count, names, shapes, dtype, data, digest="")
    digest = bucket_digest(index, count, dtype, dict(zip(names, shapes, strict=True)), tensor_digests(bucket))
    return replace(bucket, digest=digest)


def bucket_digest(
    index: int, count: int, dtype: str, shapes: Mapping[str, Sequence[int]], digests: Mapping[str, str]
) -> str:
    """BLAKE2b (32 bytes, hexadecimal) over everything that a bucket says; its bytes enter by their digests."""
    head = [index, count, dtype, [[name, list(shape), digests[name]] for name, shape in shapes.items()]]
    return hashlib.blake2b(repr(head).encode(), digest_size=32).hexdigest()


def tensor_digests(bucket: Bucket) -> dict[str, str]:
    """BLAKE2b (32 bytes, hexadecimal) of each tensor's bytes, by name."""
    return {
        name: hashlib.blake2b(part.data, digest_size=32).hexdigest() for name, part in zip(*_parts(bucket), strict=True)
    }


def _parts(bucket: Bucket) -> tuple[Sequence[str], list[NDArray[np.uint8]]]:
    sizes = [ITEM_BYTES[bucket.dtype] * math.prod(shape) for shape in bucket.shapes]
    ends = list(itertools.accumulate(sizes))
    return bucket.names, [bucket.data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def combine_digests(digests: Sequence[str]) -> str:
    """One digest for a whole model: BLAKE2b over its buckets' digests in the order of their index."""
    return hashlib.blake2b("\n".join(digests).encode(), digest_size=32).hexdigest()


def verify_bucket(bucket: Bucket) -> dict[str, str]:
    """Checks that a bucket is what its sender made.

    Returns:
        The digest of each tensor's bytes, by name.

    Raises:
        PublicationError: The shapes do not fill the bytes, or the digest is not that of the contents.
    """
    where = f"weight bucket {bucket.index} of {bucket.count}"
    if bucket.dtype not in ITEM_BYTES or not 0 <= bucket.index < bucket.count:
        raise PublicationError(
            where,
            found=f"dtype {bucket.dtype!r}",
            needed=f"an index below the count and a dtype out of {sorted(ITEM_BYTES)}",
            action="Publish the weights again.",
        )
    needed = ITEM_BYTES[bucket.dtype] * sum(math.prod(shape) for shape in bucket.shapes)
    if bucket.data.nbytes != needed or not len(bucket.names) == len(set(bucket.names)) == len(bucket.shapes):
        raise PublicationError(
            where,
            found=f"{bucket.data.nbytes} bytes for {len(bucket.names)} names",
            needed=f"{needed} bytes for {len(bucket.shapes)} shapes",
            action="Publish the weights again.",
        )
    digests = tensor_digests(bucket)
    shapes = dict(zip(bucket.names, bucket.shapes, strict=True))
    found = bucket_digest(bucket.index, bucket.count, bucket.dtype, shapes, digests)
    if found != bucket.digest:
        raise PublicationError(
            where, found=f"digest {found[:16]}", needed=bucket.digest[:16], action="Publish the weights again."
        )
    return digests


def bucket_tensors(bucket: Bucket) -> dict[str, Tensor]:
    """The bucket's tensors by name, as views of its bytes: treat them as read-only."""
    import torch

    with warnings.catch_warnings():
        # Arrays from the object store are read-only and torch has no read-only tensors; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        whole = torch.from_numpy(bucket.data)
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        end = start + ITEM_BYTES[bucket.dtype] * math.prod(shape)
        tensors[name] = whole[start:end].view(_torch_dtype(bucket.dtype)).reshape(shape)
        start = end
    return tensors


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return dtypes[name]
