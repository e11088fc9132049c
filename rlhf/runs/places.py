"""Where the files of a checkpoint lie: hashed while they are written, verified when they are read.

A place is a local folder or a URL that fsspec knows (``s3://bucket/run/step_12/...``), as text, so that it travels to
the ranks as it is. Each rank writes its own files and tells their sizes and digests; nobody reads them again for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.errors import CheckpointError
from rlhf.runs.files import fsync_path

CHUNK_BYTES = 16 << 20
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a manifest says of one file.

    Attributes:
        size: Bytes.
        blake2b: Digest of 32 bytes, in hexadecimal.
    """

    size: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """How far a write in the background is.

    Attributes:
        files: What was written, by name; None while it goes on, and where it failed.
        fault: Why it failed; empty where it did not.
    """

    files: Mapping[str, FileEntry] | None = None
    fault: str = ""


def is_url(place: str) -> bool:
    """Whether a place is a URL, not a local folder."""
    return "://" in place


def join(place: str, name: str) -> str:
    """A place below another one."""
    return posixpath.join(place, name) if name else place


def file_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Credentials are those of the environment."""
    import fsspec

    local = place.startswith(("file://", "local://"))  # object stores have no folders to be made
    system, path = fsspec.core.url_to_fs(place, **({"auto_mkdir": True} if local else {}))
    return system, str(path)


def write_file(place: str, name: str, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Writes one file and hashes what it writes; a local one is flushed to the disk.

    Args:
        place: Folder or URL.
        name: Relative name, with ``/`` between its parts.
        chunks: The file's bytes, in order.

    Raises:
        OSError: As the file system says it.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    size = 0
    with _open_new(place, name) as stream:
        for chunk in chunks:
            digest.update(chunk)
            view = memoryview(chunk)
            stream.write(view)
            size += view.nbytes
    return FileEntry(size, digest.hexdigest())


@contextlib.contextmanager
def _open_new(place: str, name: str) -> Iterator[BinaryIO]:
    if is_url(place):
        system, path = file_system(join(place, name))
        with system.open(path, "wb") as stream:
            yield stream
        return
    target = Path(place) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def fetch_file(place: str, name: str, entry: FileEntry, scratch: Path | None) -> Path:
    """A verified local file: the file itself where the place is a folder, else a copy.

    Args:
        place: Folder or URL.
        name: Relative name.
        entry: What the manifest says of it.
        scratch: Takes the copies of a URL's files; may be None for a folder.

    Raises:
        CheckpointError: It is missing, or has another size or other bytes than the manifest says.
        OSError: It could not be read, or its copy not be written, which says nothing about the checkpoint.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    path = Path(place) / name
    try:
        if is_url(place):
            assert scratch is not None
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as copy:
                for chunk in _read_chunks(place, name):
                    digest.update(chunk)
                    copy.write(chunk)
        else:
            for chunk in _read_chunks(place, name):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise bad_file(place, f"{name} missing") from error
    if path.stat().st_size != entry.size:
        raise bad_file(place, f"{name} of {path.stat().st_size} bytes instead of {entry.size}")
    if digest.hexdigest() != entry.blake2b:
        raise bad_file(place, f"{name} with altered bytes")
    return path


def digest_of(data: bytes) -> str:
    """The digest of some bytes, as a manifest has it."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def _read_chunks(place: str, name: str) -> Iterator[bytes]:
    with _open_old(place, name) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _open_old(place: str, name: str) -> Any:
    if is_url(place):
        system, path = file_system(join(place, name))
        return system.open(path, "rb")
    return (Path(place) / name).open("rb")


def sync_folders(root: Path) -> None:
    """Flushes the entries of a folder and of all below it; files are flushed by whoever writes them."""
    for path in root.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            fsync_path(path)
    fsync_path(root)


def bad_file(place: str, found: str) -> CheckpointError:
    """The error for a checkpoint that is not as its manifest says."""
    action = "Restore it from a copy, or remove it to use an older checkpoint."
    return CheckpointError(place, found=found, needed="a checkpoint as its manifest lists it", action=action)


def unreachable(place: str, error: OSError) -> CheckpointError:
    """The error for checkpoints that could not be looked at, good or not."""
    return CheckpointError(
        place,
        found=f"no answer that can be used ({error.strerror or error})",
        needed="a storage that can be read",
        action="Nothing was changed. Look at the storage and at its credentials, then run the same command again.",
    )


def not_saved(place: str, error: OSError) -> CheckpointError:
    """The error for a checkpoint that could not be written."""
    return CheckpointError(
        place,
        found=error.strerror or str(error),
        needed="a writable disk with room for one more checkpoint",
        action="Free space or mend the permissions, then run the same command again; earlier checkpoints are intact.",
    )
