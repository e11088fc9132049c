"""What holds the checkpoints of one stage: a local folder, or a prefix in an object store.

Both keep the same promise by the means that they have. A local checkpoint comes into being by the rename of its folder;
an object store has no rename of folders, so there the manifest, written last, is what makes a checkpoint exist::

    step_12/                          a folder                step_12/MANIFEST.json      an object store
        learner/... state.json                                step_12/3f2a91c0/learner/... state.json
        MANIFEST.json

The extra part is drawn anew for every save, so no save ever writes over another one's files.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from rlhf.runs.files import TEMPORARY, fsync_path, write_text
from rlhf.runs.places import bad_file, is_url, join, sync_folders

MANIFEST = "MANIFEST.json"
LATEST = "LATEST"
STEP = re.compile(r"^step_(\d+)$")
_REPLACED = ".old-"
_BAD = "bad-"


class Storage(ABC):
    """Holds the checkpoints of one stage; one driver at a time writes there. All failures are ``OSError``s.

    Attributes:
        where: Folder or URL, for people.
    """

    where: str

    @abstractmethod
    def begin(self, step: int) -> str:
        """An empty place for the files of a new checkpoint, which does not exist before ``commit``."""

    @abstractmethod
    def folder_in_step(self, place: str) -> str:
        """The part of a place from ``begin`` below ``step_N`` once it is committed; empty in a local folder."""

    @abstractmethod
    def commit(self, place: str, step: int, manifest: str) -> None:
        """Makes the checkpoint exist, in place of one of the same step."""

    @abstractmethod
    def discard(self, place: str) -> None:
        """Removes what ``begin`` gave, as far as that can be done."""

    @abstractmethod
    def steps(self) -> list[int]:
        """Steps of the checkpoints, newest first, verified or not."""

    @abstractmethod
    def place(self, step: int, folder: str = "") -> str:
        """Where a checkpoint's files are."""

    @abstractmethod
    def sizes(self, place: str, expected: Iterable[str]) -> dict[str, int]:
        """Bytes of every file in a place, by relative name; those expected are found where a listing lacks them.

        Raises:
            CheckpointError: There is a link, which could point outside what the manifest protects.
        """

    @abstractmethod
    def read(self, place: str, name: str) -> bytes:
        """A small file, whole."""

    @abstractmethod
    def set_aside(self, name: str) -> str:
        """Takes a checkpoint (``step_N``) or a pointer out of sight, kept for a look at it; returns where it is now."""

    @abstractmethod
    def remove(self, step: int) -> None:
        """Removes a checkpoint; killed in between, it leaves none that looks whole."""

    @abstractmethod
    def clean(self) -> list[str]:
        """Removes what a killed driver left and returns the unfinished saves among it."""

    @abstractmethod
    def read_pointer(self, name: str) -> str | None:
        """A pointer's text, or None."""

    @abstractmethod
    def write_pointer(self, name: str, text: str) -> None:
        """Replaces a pointer."""


def storage_at(where: str | Path | Storage) -> Storage:
    """The storage of a local folder or of a URL."""
    if isinstance(where, Storage):
        return where
    if is_url(str(where)):
        from rlhf.runs.object_store import ObjectStore

        return ObjectStore(str(where))
    return LocalFolder(Path(where))


class LocalFolder(Storage):
    """A folder on a local or shared file system with an atomic rename."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def begin(self, step: int) -> str:
        """See ``Storage.begin``."""
        self.root.mkdir(parents=True, exist_ok=True)
        fsync_path(self.root.parent)
        temporary = self.root / f"{TEMPORARY}step_{step}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        return str(temporary)

    def folder_in_step(self, place: str) -> str:
        """Files lie beside the manifest."""
        return ""

    def commit(self, place: str, step: int, manifest: str) -> None:
        """Renames; a checkpoint of the same step steps aside first, and ``clean`` brings it back after a crash."""
        temporary, final = Path(place), self.root / f"step_{step}"
        write_text(temporary / MANIFEST, manifest)
        sync_folders(temporary)
        aside = final.with_name(_REPLACED + final.name)
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
        fsync_path(self.root)
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self, place: str) -> None:
        """See ``Storage.discard``."""
        shutil.rmtree(place, ignore_errors=True)

    def steps(self) -> list[int]:
        """See ``Storage.steps``."""
        if not self.root.is_dir():
            return []
        found = [STEP.match(path.name) for path in self.root.iterdir() if path.is_dir()]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def place(self, step: int, folder: str = "") -> str:
        """See ``Storage.place``."""
        return join(str(self.root / f"step_{step}"), folder)

    def sizes(self, place: str, expected: Iterable[str]) -> dict[str, int]:
        """See ``Storage.sizes``."""
        found = {}
        for path in sorted(Path(place).rglob("*")):
            if path.is_symlink():
                raise bad_file(str(path), "a symbolic link")
            if path.is_file():
                found[path.relative_to(place).as_posix()] = path.stat().st_size
        found.pop(MANIFEST, None)
        return found

    def read(self, place: str, name: str) -> bytes:
        """See ``Storage.read``."""
        return (Path(place) / name).read_bytes()

    def set_aside(self, name: str) -> str:
        """Renames it to ``bad-NAME``, in place of one that is there already."""
        aside = self.root / (_BAD + name)
        if aside.is_dir():
            shutil.rmtree(aside)
        os.replace(self.root / name, aside)
        return str(aside)

    def remove(self, step: int) -> None:
        """Renames first: a half-deleted checkpoint must not look like one."""
        path = self.root / f"step_{step}"
        doomed = path.with_name(f"{TEMPORARY}pruned-{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)

    def clean(self) -> list[str]:
        """Removes unfinished saves and half-pruned checkpoints; restores one that was being replaced."""
        unfinished = []
        for path in list(self.root.iterdir()) if self.root.is_dir() else []:
            if path.name.startswith(TEMPORARY):
                # A rank of a driver that was killed may still be writing into it; what is left goes the next time.
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                if path.name.startswith(f"{TEMPORARY}step_"):
                    unfinished.append(str(path))
            elif path.name.startswith(_REPLACED):
                final = self.root / path.name.removeprefix(_REPLACED)
                shutil.rmtree(path) if final.exists() else os.rename(path, final)
        return unfinished

    def read_pointer(self, name: str) -> str | None:
        """See ``Storage.read_pointer``."""
        path = self.root / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    def write_pointer(self, name: str, text: str) -> None:
        """See ``Storage.write_pointer``."""
        write_text(self.root / name, text)
