"""Checkpoints under a URL that fsspec knows, where no rename is atomic and a listing may be late."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable
from typing import Any

from rlhf.runs.places import file_system, join
from rlhf.runs.storage import LATEST, MANIFEST, STEP, Storage

BAD_MANIFEST = "BAD.json"
"""The manifest's name in a checkpoint that failed its verification."""


class ObjectStore(Storage):
    """A prefix in an object store. A checkpoint exists where its manifest does.

    What decides (manifests, pointers, the files that a manifest names) is asked for by name, as stores answer that
    truthfully at once; listings only say what else is there, and are never taken from a cache.
    """

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self._system, self._root = file_system(self.where)
        self._root = self._root.rstrip("/")

    def begin(self, step: int) -> str:
        """Draws the place; there is nothing to be made."""
        return join(self.place(step), uuid.uuid4().hex[:8])

    def folder_in_step(self, place: str) -> str:
        """The part that was drawn."""
        return place.rsplit("/", 1)[-1]

    def commit(self, place: str, step: int, manifest: str) -> None:
        """Writes the manifest last, in one piece, then removes the files of one that it replaces."""
        self._system.pipe_file(self._path(f"step_{step}/{MANIFEST}"), manifest.encode())
        self._remove_but(step, {MANIFEST, self.folder_in_step(place)})

    def discard(self, place: str) -> None:
        """See ``Storage.discard``; what can't be removed now is removed by ``clean`` or with its step."""
        step = place.removeprefix(self.where).strip("/").split("/")[0]
        with contextlib.suppress(OSError):
            # A commit may have failed behind its manifest: that checkpoint exists.
            if self.folder_in_step(place) not in (self.read_pointer(f"{step}/{MANIFEST}") or ""):
                self._remove_tree(self._in_store(place))

    def steps(self) -> list[int]:
        """Steps that the listing or the pointer names and that have a manifest."""
        names = [*self._names(""), (self.read_pointer(LATEST) or "").strip()]
        found = {int(match[1]) for name in names if (match := STEP.match(name))}
        return sorted((step for step in found if self._is_there(f"step_{step}/{MANIFEST}")), reverse=True)

    def place(self, step: int, folder: str = "") -> str:
        """See ``Storage.place``."""
        return join(join(self.where, f"step_{step}"), folder)

    def sizes(self, place: str, expected: Iterable[str]) -> dict[str, int]:
        """See ``Storage.sizes``."""
        root = self._in_store(place)
        self._system.invalidate_cache()
        try:
            listed = self._system.find(root, detail=True)
        except FileNotFoundError:
            listed = {}
        found = {path[len(root) :].strip("/"): int(info["size"]) for path, info in listed.items()}
        for name in set(expected) - set(found):
            try:
                found[name] = int(self._system.info(f"{root}/{name}")["size"])
            except FileNotFoundError:
                continue
        return found

    def read(self, place: str, name: str) -> bytes:
        """See ``Storage.read``."""
        return bytes(self._system.cat_file(f"{self._in_store(place)}/{name}"))

    def set_aside(self, name: str) -> str:
        """Gives a checkpoint's manifest, or the pointer, another name."""
        old, new = (f"{name}/{MANIFEST}", f"{name}/{BAD_MANIFEST}") if STEP.match(name) else (name, f"bad-{name}")
        self._system.pipe_file(self._path(new), self._system.cat_file(self._path(old)))
        self._system.rm_file(self._path(old))
        return join(self.where, new)

    def remove(self, step: int) -> None:
        """Removes the manifest first: without it nothing is left but files."""
        self._system.rm_file(self._path(f"step_{step}/{MANIFEST}"))
        self._remove_tree(self._path(f"step_{step}"))

    def clean(self) -> list[str]:
        """Removes files without a manifest; those of a checkpoint that was set aside stay."""
        unfinished = []
        for name in self._names(""):
            if not STEP.match(name) or self._is_there(f"{name}/{MANIFEST}") or self._is_there(f"{name}/{BAD_MANIFEST}"):
                continue
            self._remove_tree(self._path(name))
            unfinished.append(join(self.where, name))
        return unfinished

    def read_pointer(self, name: str) -> str | None:
        """See ``Storage.read_pointer``."""
        try:
            return bytes(self._system.cat_file(self._path(name))).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def write_pointer(self, name: str, text: str) -> None:
        """See ``Storage.write_pointer``."""
        self._system.pipe_file(self._path(name), text.encode())

    # Paths and listings

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _in_store(self, place: str) -> str:
        """The path of a place in its file system."""
        return self._path(place.removeprefix(self.where).strip("/"))

    def _names(self, folder: str) -> list[str]:
        """What lies directly below a folder, as the listing has it."""
        self._system.invalidate_cache()
        try:
            found: list[Any] = self._system.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in found})

    def _is_there(self, name: str) -> bool:
        self._system.invalidate_cache()
        return bool(self._system.exists(self._path(name)))

    def _remove_but(self, step: int, kept: set[str]) -> None:
        for name in self._names(f"step_{step}"):
            if name not in kept:
                self._remove_tree(self._path(f"step_{step}/{name}"))

    def _remove_tree(self, path: str) -> None:
        self._system.invalidate_cache()
        try:
            self._system.rm(path, recursive=True)
        except FileNotFoundError:  # a store keeps no empty folders
            return
