"""Files that are there whole or not at all, and JSON lines that survive a crash in the middle of a line."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import RecordError

TEMPORARY = ".tmp-"
"""How the name of every unfinished file and directory begins."""


def fsync_path(path: Path) -> None:
    """Forces a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its place when the block ends well.

    The new file is flushed before the rename and the directory after it, so a crash at any moment leaves either the
    old file or the new one.

    Raises:
        RecordError: The disk is full, or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, suffix="-" + path.name, dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def unfinished_folder(path: Path) -> Path:
    """Where the folder that ``replacing_folder(path)`` makes lies until it is whole; the same for every process."""
    return path.with_name(TEMPORARY + path.name)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that takes its place when the block ends well.

    Files and folders are flushed before the rename and the parent after it. Two folders cannot change places in one
    step: a crash between the two renames leaves none at ``path``, and never a part of one.

    Raises:
        RecordError: The disk is full, or the directory cannot be written.
    """
    partial = unfinished_folder(path)
    aside = path.with_name(f"{TEMPORARY}before-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in (partial, aside):
            shutil.rmtree(left_by_a_crash, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield partial
        try:
            for found in (*partial.rglob("*"), partial):
                fsync_path(found)
            if path.exists():
                os.rename(path, aside)
            os.rename(partial, path)
            fsync_path(path.parent)
        except OSError as error:
            if aside.exists() and not path.exists():
                os.rename(aside, path)
            raise unwritable(path, error) from error
    finally:
        for unused in (partial, aside):
            shutil.rmtree(unused, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> RecordError:
    """The error for a file that the system did not let us write."""
    return RecordError(
        str(path),
        found=f"{error.strerror or error}",
        needed="a writable directory with free space",
        action="Free space or mend the permissions, then run the same command again; it resumes.",
    )


def share_file(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source`` (a copy where there are no hard links), whole or not at all."""
    temporary = target.with_name(TEMPORARY + target.name)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copy2(source, temporary)
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # a rename onto the same file does nothing
    except OSError as error:
        raise unwritable(target, error) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Replaces a file by a JSON document atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON document; raises ``RecordError`` with the line where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(path), str(error)) from error
    except json.JSONDecodeError as error:
        raise _unreadable(f"{path}:{error.lineno}", error.msg) from error


def _unreadable(where: str, found: str) -> RecordError:
    action = "Restore the file, or start a new run directory."
    return RecordError(where, found=found, needed="a readable record", action=action)


def append_json_line(path: Path, document: Mapping[str, Any]) -> None:
    """Appends one JSON line with a single write, so that lines of several processes never mix.

    A partial line that a crash or a full disk left at the end is closed first, so it spoils itself only.

    Raises:
        RecordError: The disk is full, or the file cannot be written.
    """
    line = json.dumps(document, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:  # a disk that is nearly full takes a part without a word, and then refuses the rest
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unwritable(path, error) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines; lines that a crash cut short are left out."""
    if not path.is_file():
        return []
    documents = []
    for line in path.read_bytes().split(b"\n"):
        try:
            document = json.loads(line) if line.strip() else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
        if isinstance(document, dict):
            documents.append(document)
    return documents


def keep_json_lines(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> int:
    """Rewrites a file of JSON lines with the lines that ``keep`` accepts; returns how many were dropped."""
    documents = read_json_lines(path)
    kept = [document for document in documents if keep(document)]
    if path.is_file() and len(kept) < len(documents):
        lines = [json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n" for document in kept]
        write_text(path, "".join(lines))
    return len(documents) - len(kept)
