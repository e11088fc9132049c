"""Fingerprints of data files, so that a resumed run knows that it reads the data it started with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from rlhf.data.formats import resolve_file


def fingerprint_file(path: str | Path) -> str:
    """Returns the blake2b hash of a file's bytes, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with resolve_file(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_files(paths: Iterable[str | Path]) -> dict[str, str]:
    """Returns each file's fingerprint by the path as it was given."""
    return {str(path): fingerprint_file(path) for path in paths}
