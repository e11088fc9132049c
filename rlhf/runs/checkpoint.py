"""Checkpoints that a crash cannot spoil.

What a stage's checkpoints look like (in an object store a little differently, see ``rlhf.runs.storage``)::

    step_12/            what the writers wrote, plus state.json and MANIFEST.json (size and digest of every file)
    LATEST              name of the newest checkpoint, for people and tools
    BEST                JSON: the best checkpoint by a metric; never pruned
    bad-step_11/        failed its verification and was set aside; never loaded

The writers, one a rank, fill a place that is no checkpoint yet and say what they wrote; then the manifest is put
together from what they said, the checkpoint comes into being in one step, the pointer moves, and old ones are pruned.
Loading trusts the manifests and not the pointer, so a crash before the pointer moves loses nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, RecordError
from rlhf.runs.places import FileEntry, bad_file, digest_of, fetch_file, join, not_saved, unreachable, write_file
from rlhf.runs.storage import LATEST, MANIFEST, Storage, storage_at

STATE = "state.json"
BEST = "BEST"
FORMAT = 2
"""Of the manifest and of what the ranks write: those of another one are not read."""

Where = str | Path | Storage
"""The checkpoints of one stage: a folder, a URL, or the storage itself."""

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Receives a kind and its fields, for example ``lambda kind, fields: events.record(kind, **fields)``."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose manifest is good; the bytes of its files are checked by whoever reads them.

    Attributes:
        place: Folder or URL of its files.
        step: The step after which it was taken.
        state: The driver's own state (cursor, counters, seeds) as plain JSON.
        files: What the manifest says of each file.
    """

    place: str
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    def below(self, part: str) -> Mapping[str, FileEntry]:
        """The files below one folder, by their names there."""
        prefix = f"{part}/"
        return {name.removeprefix(prefix): entry for name, entry in self.files.items() if name.startswith(prefix)}


# Saving


def save(
    where: Where,
    step: int,
    write: Callable[[str], Mapping[str, FileEntry]],
    *,
    state: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Takes a checkpoint: ``begin``, ``write``, ``commit``.

    Args:
        where: Holds the checkpoints of one stage; one process at a time may save there.
        step: Names the checkpoint; an existing one of the same step is replaced.
        write: Fills an empty place and says what it wrote.
        state: The driver's own state, plain JSON.
        keep: How many of the newest checkpoints stay; the best one stays as well.

    Raises:
        CheckpointError: The disk is full or refused; the checkpoints that were there are intact.
    """
    storage = storage_at(where)
    place = begin(storage, step, keep=keep)
    saved: Checkpoint | None = None
    try:
        saved = commit(storage, place, step, write(place), state=state, keep=keep)
        return saved
    except OSError as error:
        raise not_saved(storage.place(step), error) from error
    finally:
        if saved is None:
            storage.discard(place)


def begin(where: Where, step: int, *, keep: int) -> str:
    """An empty place for the files of a new checkpoint, which does not exist before ``commit``.

    Raises:
        CheckpointError: The disk is full or refused.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, not {keep} and {step}")
    storage = storage_at(where)
    try:
        storage.clean()
        return storage.begin(step)
    except OSError as error:
        raise not_saved(storage.place(step), error) from error


def commit(
    where: Where,
    place: str,
    step: int,
    files: Mapping[str, FileEntry],
    *,
    state: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Makes a checkpoint of what the writers put into a place from ``begin``, then moves the pointer and prunes.

    Raises:
        CheckpointError: A file is not as its writer said, or the disk is full or refused; the checkpoints that were
            there are intact.
    """
    storage = storage_at(where)
    try:
        text = json.dumps(dict(state), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        written = {**files, STATE: write_file(place, STATE, [text.encode()])}
        check_sizes(storage, place, written)
        table = {name: {"size": entry.size, "blake2b": entry.blake2b} for name, entry in sorted(written.items())}
        folder = storage.folder_in_step(place)
        manifest = {"format": FORMAT, "step": step, "folder": folder, "files": table}
        manifest["files_blake2b"] = _table_digest(step, folder, table)
        storage.commit(place, step, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        storage.write_pointer(LATEST, f"step_{step}\n")
        _prune(storage, keep)
    except OSError as error:
        raise not_saved(storage.place(step), error) from error
    except RecordError as error:
        raise CheckpointError(error.where, found=error.found, needed=error.needed, action=error.action) from error
    return Checkpoint(storage.place(step, folder), step, dict(state), written)


def check_sizes(storage: Storage, place: str, files: Mapping[str, FileEntry]) -> None:
    """Raises ``CheckpointError`` unless a place holds just these files, of these sizes; reads none of them."""
    present = storage.sizes(place, files)
    if missing := sorted(set(files) - set(present)):
        raise bad_file(place, f"{missing[0]} missing")
    if extra := sorted(set(present) - set(files)):
        raise bad_file(place, f"{extra[0]}, which the manifest does not list")
    for name, entry in files.items():
        if present[name] != entry.size:
            raise bad_file(place, f"{name} of {present[name]} bytes instead of {entry.size}")


def _table_digest(step: int, folder: str, files: Mapping[str, Any]) -> str:
    return digest_of(json.dumps([step, folder, files], sort_keys=True).encode())


def _prune(storage: Storage, keep: int) -> None:
    best = _read_best(storage)
    for step in storage.steps()[keep:]:
        if best is None or best["step"] != step:
            storage.remove(step)


# Loading


def steps(where: Where) -> list[int]:
    """Steps of the checkpoints, newest first, verified or not."""
    return storage_at(where).steps()


def open_step(where: Where, step: int) -> Checkpoint:
    """Checks the manifest of one checkpoint, the names and sizes of its files, and the driver's state.

    Raises:
        CheckpointError: The first thing that is wrong.
        OSError: The storage does not answer.
    """
    storage = storage_at(where)
    outside = storage.place(step)
    try:
        manifest = json.loads(storage.read(outside, MANIFEST))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise bad_file(outside, f"no readable manifest ({error})") from error
    folder, files = _manifest_parts(outside, step, manifest)
    place = storage.place(step, folder)
    check_sizes(storage, place, files)
    state = storage.read(place, STATE)
    if digest_of(state) != files[STATE].blake2b:
        raise bad_file(place, f"{STATE} with altered bytes")
    return Checkpoint(place, step, json.loads(state), files)


def _manifest_parts(place: str, step: int, manifest: Any) -> tuple[str, dict[str, FileEntry]]:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise bad_file(place, "a manifest of an unknown format")
    found, folder, files = manifest.get("step"), manifest.get("folder"), manifest.get("files")
    if not isinstance(found, int) or not isinstance(folder, str) or not isinstance(files, dict) or STATE not in files:
        raise bad_file(place, "an incomplete manifest")
    if manifest.get("files_blake2b") != _table_digest(found, folder, files):
        raise bad_file(place, "an altered manifest")
    if found != step:
        raise bad_file(place, f"a manifest of step {found}")
    return folder, {name: FileEntry(entry["size"], entry["blake2b"]) for name, entry in files.items()}


def first_fault(checkpoint: Checkpoint) -> str:
    """What is wrong with a checkpoint's files, read one after another in this process; empty where nothing is."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, entry in checkpoint.files.items():
            try:
                fetch_file(checkpoint.place, name, entry, Path(scratch))
            except CheckpointError as error:
                return error.found
    return ""


def load_latest(
    where: Where, verify: Callable[[Checkpoint], str] = first_fault, *, on_event: OnEvent | None = None
) -> Checkpoint | None:
    """Returns the newest good checkpoint, or None where none was ever taken.

    Bad ones are set aside and reported as ``checkpoint_rejected`` events; what a killed save left is removed and
    reported as ``checkpoint_unfinished``; a pointer that names another checkpoint is mended and reported as
    ``checkpoint_pointer_mended``.

    Args:
        where: The checkpoints.
        verify: Reads a checkpoint's files, and says what is wrong with them (empty: nothing).
        on_event: Receives the events.

    Raises:
        CheckpointError: There are checkpoints, or a pointer to one, and none is good; or the storage does not answer.
            Nothing is moved then.
    """
    storage = storage_at(where)
    try:
        search = _Search(storage, on_event)
        while (candidate := search.next_candidate()) is not None:
            if not (fault := verify(candidate)):
                return search.accept(candidate)
            search.reject(candidate.step, fault)
        search.check_none_was_taken()
        return None
    except OSError as error:
        raise unreachable(storage.where, error) from error


async def load_latest_async(
    where: Where, verify: Callable[[Checkpoint], Awaitable[str]], *, on_event: OnEvent | None = None
) -> Checkpoint | None:
    """Like ``load_latest``, with files that are verified by somebody else, such as the ranks that read them."""
    storage = storage_at(where)
    try:
        search = _Search(storage, on_event)
        while (candidate := search.next_candidate()) is not None:
            if not (fault := await verify(candidate)):
                return search.accept(candidate)
            search.reject(candidate.step, fault)
        search.check_none_was_taken()
        return None
    except OSError as error:
        raise unreachable(storage.where, error) from error


class _Search:
    """Goes from the newest checkpoint to the oldest, and moves nothing until a good one is found."""

    def __init__(self, storage: Storage, on_event: OnEvent | None) -> None:
        self._storage = storage
        self._on_event: OnEvent = on_event or (lambda kind, fields: None)
        for unfinished in storage.clean():
            self._on_event("checkpoint_unfinished", {"path": unfinished})
        self._left = storage.steps()
        self._rejected: dict[int, str] = {}

    def next_candidate(self) -> Checkpoint | None:
        while self._left:
            step = self._left.pop(0)
            try:
                return open_step(self._storage, step)
            except CheckpointError as error:
                self.reject(step, error.found)
        return None

    def reject(self, step: int, fault: str) -> None:
        self._rejected[step] = fault

    def accept(self, checkpoint: Checkpoint) -> Checkpoint:
        for step, fault in self._rejected.items():
            aside = self._storage.set_aside(f"step_{step}")
            self._on_event("checkpoint_rejected", {"path": aside, "found": fault})
        named = (self._storage.read_pointer(LATEST) or "").strip()
        if named != (now := f"step_{checkpoint.step}"):
            self._storage.write_pointer(LATEST, f"{now}\n")
            self._on_event("checkpoint_pointer_mended", {"found": named, "now": now})
        return checkpoint

    def check_none_was_taken(self) -> None:
        if not self._rejected and self._storage.read_pointer(LATEST) is None:
            return
        faults = "; ".join(f"step_{step} with {fault}" for step, fault in self._rejected.items())
        raise CheckpointError(
            self._storage.where,
            found=faults or "LATEST but no checkpoint",
            needed="at least one good checkpoint",
            action="Restore one from a copy; to start from scratch on purpose, remove this directory.",
        )


# The best one


def mark_best(where: Where, step: int, metric: str, value: float, *, higher_is_better: bool = True) -> bool:
    """Makes a saved checkpoint the best one if its metric beats the best so far; returns whether it did.

    A value that is not finite never wins, and an equal one does not either, so that the earliest best stays.
    """
    storage = storage_at(where)
    present = storage.steps()
    if step not in present:
        raise bad_file(storage.place(step), "no such checkpoint")
    best = _read_best(storage)
    if not math.isfinite(value):
        return False
    if best is not None and best["metric"] == metric and best["step"] in present:
        better = value > best["value"] if higher_is_better else value < best["value"]
        if not better:
            return False
    text = json.dumps({"step": step, "metric": metric, "value": float(value)}, indent=2) + "\n"
    try:
        storage.write_pointer(BEST, text)
    except OSError as error:
        raise not_saved(join(storage.where, BEST), error) from error
    return True


def open_best(where: Where, *, on_event: OnEvent | None = None) -> Checkpoint | None:
    """Returns the best checkpoint, or None where none was marked or its manifest is bad.

    It comes at the end of a training, whose last weights are still there to be taken: damage costs the choice, not the
    training. A bad pointer or checkpoint is set aside and reported as a ``checkpoint_rejected`` event.
    """
    storage = storage_at(where)
    best = _read_best(storage)
    if best is None:
        if storage.read_pointer(BEST) is not None:
            _reject_best(storage, BEST, "no readable pointer", on_event)
        return None
    try:
        return open_step(storage, best["step"])
    except CheckpointError as error:
        is_there = best["step"] in storage.steps()
        _reject_best(storage, f"step_{best['step']}" if is_there else BEST, error.found, on_event)
        return None


def reject_best(where: Where, best: Checkpoint, fault: str, *, on_event: OnEvent | None = None) -> None:
    """Sets the best checkpoint aside, whose files turned out to be bad."""
    _reject_best(storage_at(where), f"step_{best.step}", fault, on_event)


def _reject_best(storage: Storage, name: str, fault: str, on_event: OnEvent | None) -> None:
    aside = storage.set_aside(name)
    if on_event is not None:
        on_event("checkpoint_rejected", {"path": aside, "found": fault})


def _read_best(storage: Storage) -> dict[str, Any] | None:
    """The pointer; None where there is none and where it is damaged, which must not keep anyone from saving."""
    try:
        best = json.loads(storage.read_pointer(BEST) or "")
    except json.JSONDecodeError:
        return None
    fields = {"step": int, "metric": str, "value": float}
    if not isinstance(best, dict) or set(best) != set(fields):
        return None
    typed = all(isinstance(best[name], kind) for name, kind in fields.items())
    return best if typed and math.isfinite(best["value"]) else None
