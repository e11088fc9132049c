"""Checkpoints that a crash cannot spoil.

Layout of one checkpoint directory::

    step_12/            what the writer wrote, plus state.json and MANIFEST.json (size and digest of every file)
    LATEST              name of the newest checkpoint, for people and tools
    BEST                JSON: the best checkpoint by a metric; never pruned
    bad-step_11/        failed its verification and was set aside; never loaded

A save fills a temporary directory, flushes it, writes the manifest, renames the directory, then moves the pointer, then
prunes. The rename is the moment from which the checkpoint exists. Loading trusts the manifests and not the pointer, so
a crash between rename and pointer loses nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, RecordError
from rlhf.runs.files import TEMPORARY, fsync_path, read_json, write_json, write_text

MANIFEST = "MANIFEST.json"
STATE = "state.json"
LATEST = "LATEST"
BEST = "BEST"
_STEP = re.compile(r"^step_(\d+)$")
_REPLACED = ".old-"
_BAD = "bad-"

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Receives a kind and its fields, for example ``lambda kind, fields: events.record(kind, **fields)``."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte has been checked.

    Attributes:
        path: Its directory.
        step: The step after which it was taken.
        state: The driver's own state (cursor, counters, seeds) as plain JSON.
    """

    path: Path
    step: int
    state: Mapping[str, Any]


def save(
    directory: Path, step: int, write: Callable[[Path], None], *, state: Mapping[str, Any], keep: int
) -> Checkpoint:
    """Takes a checkpoint.

    Args:
        directory: Holds the checkpoints of one stage; one process at a time may save there.
        step: Names the checkpoint; an existing one of the same step is replaced.
        write: Fills an existing empty directory; the files must be complete and closed when it returns.
        state: The driver's own state, plain JSON.
        keep: How many of the newest checkpoints stay; the best one stays as well.

    Raises:
        CheckpointError: The disk is full or refused; the checkpoints that were there are intact.
    """
    temporary = _begin(directory, step, keep)
    try:
        write(temporary)
    except OSError as error:
        raise _not_saved(directory, step, error) from error
    else:
        return _finish(directory, temporary, step, state, keep)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


async def save_async(
    directory: Path, step: int, write: Callable[[Path], Awaitable[None]], *, state: Mapping[str, Any], keep: int
) -> Checkpoint:
    """Like ``save`` with a writer that is a coroutine; hashing and flushing run in a thread."""
    temporary = await asyncio.to_thread(_begin, directory, step, keep)
    written = False
    try:
        await write(temporary)
        written = True
    except OSError as error:
        raise _not_saved(directory, step, error) from error
    finally:
        if not written:  # a cancelled or failed writer leaves no litter
            shutil.rmtree(temporary, ignore_errors=True)
    # A cancellation from here on does not tear the rename apart: the thread runs to its end.
    return await asyncio.shield(asyncio.to_thread(_finish_and_clean, directory, temporary, step, state, keep))


def _finish_and_clean(directory: Path, temporary: Path, step: int, state: Mapping[str, Any], keep: int) -> Checkpoint:
    try:
        return _finish(directory, temporary, step, state, keep)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _begin(directory: Path, step: int, keep: int) -> Path:
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, not {keep} and {step}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fsync_path(directory.parent)
        _clean(directory)
        temporary = directory / f"{TEMPORARY}step_{step}-{os.getpid()}"
        temporary.mkdir()
    except OSError as error:
        raise _not_saved(directory, step, error) from error
    return temporary


def _finish(directory: Path, temporary: Path, step: int, state: Mapping[str, Any], keep: int) -> Checkpoint:
    final = directory / f"step_{step}"
    try:
        write_json(temporary / STATE, state)
        write_json(temporary / MANIFEST, _build_manifest(temporary, step))
        fsync_path(temporary)
        _put_in_place(temporary, final)
        write_text(directory / LATEST, final.name + "\n")
        _prune(directory, keep)
    except OSError as error:
        raise _not_saved(directory, step, error) from error
    except RecordError as error:
        raise CheckpointError(error.where, found=error.found, needed=error.needed, action=error.action) from error
    return Checkpoint(final, step, dict(state))


def _put_in_place(temporary: Path, final: Path) -> None:
    """Renames; a checkpoint of the same step steps aside first, and ``_clean`` brings it back after a crash."""
    aside = final.with_name(_REPLACED + final.name)
    if final.exists():
        os.rename(final, aside)
    os.rename(temporary, final)
    fsync_path(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _clean(directory: Path) -> list[Path]:
    """Removes what a crash left: unfinished saves, half-pruned checkpoints; restores one that was being replaced.

    Returns:
        The unfinished saves among them.
    """
    unfinished = []
    for path in list(directory.iterdir()):
        if path.name.startswith(TEMPORARY):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if path.name.startswith(f"{TEMPORARY}step_"):
                unfinished.append(path)
        elif path.name.startswith(_REPLACED):
            final = directory / path.name.removeprefix(_REPLACED)
            shutil.rmtree(path) if final.exists() else os.rename(path, final)
    return unfinished


def _prune(directory: Path, keep: int) -> None:
    best = _read_best(directory)
    for step in steps(directory)[keep:]:
        if best is not None and best["step"] == step:
            continue
        path = directory / f"step_{step}"
        doomed = path.with_name(f"{TEMPORARY}pruned-{path.name}")
        os.rename(path, doomed)  # first out of sight: a half-deleted checkpoint must not look like one
        shutil.rmtree(doomed)


def _not_saved(directory: Path, step: int, error: OSError) -> CheckpointError:
    return CheckpointError(
        str(directory / f"step_{step}"),
        found=error.strerror or str(error),
        needed="a writable disk with room for one more checkpoint",
        action="Free space or mend the permissions, then run the same command again; earlier checkpoints are intact.",
    )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _files(root: Path) -> list[str]:
    """Every file under ``root`` by relative name; a link could point outside what the manifest protects."""
    names = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(
                str(path), found="a symbolic link", needed="plain files only", action="Write a copy of the file."
            )
        if path.is_file():
            names.append(path.relative_to(root).as_posix())
    return names


def _build_manifest(root: Path, step: int) -> dict[str, Any]:
    files = {}
    for name in _files(root):
        path = root / name
        fsync_path(path)
        files[name] = {"size": path.stat().st_size, "blake2b": _digest(path)}
    for path in root.rglob("*"):
        if path.is_dir():
            fsync_path(path)
    return {"format": 1, "step": step, "files": files, "files_blake2b": _table_digest(step, files)}


def _table_digest(step: int, files: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps([step, files], sort_keys=True).encode(), digest_size=32).hexdigest()


def verify(path: Path) -> Checkpoint:
    """Checks every file of one checkpoint against its manifest.

    Raises:
        CheckpointError: The first thing that is wrong: a file missing, extra, of another size or of another digest.
    """
    match = _STEP.match(path.name)
    if match is None:
        raise _bad(path, "another kind of directory")
    try:
        manifest = read_json(path / MANIFEST)
    except RecordError as error:
        raise _bad(path, f"no readable manifest ({error.found})") from error
    step, files = _manifest_parts(path, manifest)
    if step != int(match[1]):
        raise _bad(path, f"a manifest of step {step}")
    present = set(_files(path)) - {MANIFEST}
    if missing := sorted(set(files) - present):
        raise _bad(path, f"{missing[0]} missing")
    if extra := sorted(present - set(files)):
        raise _bad(path, f"{extra[0]}, which the manifest does not list")
    for name, entry in files.items():
        size = (path / name).stat().st_size
        if size != entry["size"]:
            raise _bad(path, f"{name} of {size} bytes instead of {entry['size']}")
    for name, entry in files.items():
        if _digest(path / name) != entry["blake2b"]:
            raise _bad(path, f"{name} with altered bytes")
    return Checkpoint(path, step, read_json(path / STATE))


def _manifest_parts(path: Path, manifest: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise _bad(path, "a manifest of an unknown format")
    step, files = manifest.get("step"), manifest.get("files")
    if not isinstance(step, int) or not isinstance(files, dict) or STATE not in files:
        raise _bad(path, "an incomplete manifest")
    if manifest.get("files_blake2b") != _table_digest(step, files):
        raise _bad(path, "an altered manifest")
    return step, files


def _bad(path: Path, found: str) -> CheckpointError:
    action = "Restore it from a copy, or remove it to use an older checkpoint."
    return CheckpointError(str(path), found=found, needed="a checkpoint as its manifest lists it", action=action)


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, newest first, verified or not."""
    if not directory.is_dir():
        return []
    found = [_STEP.match(path.name) for path in directory.iterdir() if path.is_dir()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def load_latest(directory: Path, *, on_event: OnEvent | None = None) -> Checkpoint | None:
    """Returns the newest good checkpoint, or None where none was ever taken.

    Bad ones are set aside under ``bad-step_N`` and reported as ``checkpoint_rejected`` events; what a killed save left
    is removed and reported as ``checkpoint_unfinished``; a pointer that names another checkpoint is mended and reported
    as ``checkpoint_pointer_mended``.

    Raises:
        CheckpointError: There are checkpoints, or a pointer to one, and none is good. Nothing is moved then.
    """
    if not directory.is_dir():
        return None
    for path in _clean(directory):
        if on_event is not None:
            on_event("checkpoint_unfinished", {"path": str(path)})
    rejected: dict[Path, str] = {}
    for step in steps(directory):
        path = directory / f"step_{step}"
        try:
            checkpoint = verify(path)
        except CheckpointError as error:
            rejected[path] = error.found
            continue
        _set_aside(rejected, on_event)
        _mend_pointer(directory, checkpoint, on_event)
        return checkpoint
    pointed = (directory / LATEST).exists()
    if not rejected and not pointed:
        return None
    found = "; ".join(f"{path.name} with {fault}" for path, fault in rejected.items()) or "LATEST but no checkpoint"
    raise CheckpointError(
        str(directory),
        found=found,
        needed="at least one good checkpoint",
        action="Restore one from a copy; to start from scratch on purpose, remove this directory.",
    )


def _set_aside(rejected: Mapping[Path, str], on_event: OnEvent | None) -> None:
    for path, fault in rejected.items():
        aside = path.with_name(_BAD + path.name)
        if aside.is_dir():
            shutil.rmtree(aside)
        os.replace(path, aside)
        if on_event is not None:
            on_event("checkpoint_rejected", {"path": str(aside), "found": fault})


def _mend_pointer(directory: Path, checkpoint: Checkpoint, on_event: OnEvent | None) -> None:
    pointer = directory / LATEST
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    if named != checkpoint.path.name:
        write_text(pointer, checkpoint.path.name + "\n")
        if on_event is not None:
            on_event("checkpoint_pointer_mended", {"found": named, "now": checkpoint.path.name})


def mark_best(directory: Path, step: int, metric: str, value: float, *, higher_is_better: bool = True) -> bool:
    """Makes a saved checkpoint the best one if its metric beats the best so far; returns whether it did.

    A value that is not finite never wins, and an equal one does not either, so that the earliest best stays.
    """
    if step not in steps(directory):
        raise _bad(directory / f"step_{step}", "no such checkpoint")
    best = _read_best(directory)
    if not math.isfinite(value):
        return False
    if best is not None and best["metric"] == metric and best["step"] in steps(directory):
        better = value > best["value"] if higher_is_better else value < best["value"]
        if not better:
            return False
    write_json(directory / BEST, {"step": step, "metric": metric, "value": float(value)})
    return True


def load_best(directory: Path, *, on_event: OnEvent | None = None) -> Checkpoint | None:
    """Returns the best checkpoint, verified, or None where none was marked or the best one is bad.

    It comes at the end of a training, whose last weights are still there to be taken: damage costs the choice, not the
    training. A bad pointer or checkpoint is set aside under ``bad-`` and reported as a ``checkpoint_rejected`` event.
    """
    pointer = directory / BEST
    best = _read_best(directory)
    if best is None:
        if pointer.is_file():
            _set_aside({pointer: "no readable pointer"}, on_event)
        return None
    path = directory / f"step_{best['step']}"
    try:
        return verify(path)
    except CheckpointError as error:
        _set_aside({path if path.exists() else pointer: error.found}, on_event)
        return None


def _read_best(directory: Path) -> dict[str, Any] | None:
    """The pointer; None where there is none and where it is damaged, which must not keep anyone from saving."""
    try:
        best = read_json(directory / BEST)
    except RecordError:
        return None
    fields = {"step": int, "metric": str, "value": float}
    if not isinstance(best, dict) or set(best) != set(fields):
        return None
    typed = all(isinstance(best[name], kind) for name, kind in fields.items())
    return best if typed and math.isfinite(best["value"]) else None
