"""Checkpoints under a URL: the same promises without an atomic rename, with uploads that break, listings that lag."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from rlhf.errors import CheckpointError
from rlhf.runs import places
from rlhf.runs.checkpoint import (
    BEST,
    LATEST,
    MANIFEST,
    begin,
    first_fault,
    load_latest,
    mark_best,
    open_best,
    save,
    steps,
)
from rlhf.runs.places import FileEntry, fetch_file, write_file
from rlhf.runs.storage import storage_at


class FaultyFiles(LocalFileSystem):
    """Files whose writes break where they are told to, and whose listings lack what is told to be late."""

    protocol = "faulty"
    cachable = False
    break_at: str = ""
    """Part of the path of what cannot be written: its first bytes arrive, the rest does not."""
    late: tuple[str, ...] = ()
    """Parts of paths that listings do not show yet."""
    broken_reads: str = ""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("faulty://"))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" in mode and FaultyFiles.broken_reads and FaultyFiles.broken_reads in path:
            raise OSError(errno.EIO, "the network is gone")
        Path(self._strip_protocol(path)).parent.mkdir(parents=True, exist_ok=True)
        stream = super().open(path, mode, **kwargs)
        if "w" in mode and FaultyFiles.break_at and FaultyFiles.break_at in path:
            stream.write(b"half")
            stream.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stream

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        found = super().ls(path, detail=True, **kwargs)
        found = [info for info in found if not any(part in info["name"] for part in FaultyFiles.late)]
        return found if detail else [info["name"] for info in found]


@pytest.fixture(params=["memory", "file", "faulty"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty prefix of each kind of store."""
    fsspec.register_implementation("faulty", FaultyFiles, clobber=True)
    if request.param == "memory":
        yield f"memory://bucket/{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()
    else:
        yield f"{request.param}://{tmp_path}/store"


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[str]:
    fsspec.register_implementation("faulty", FaultyFiles, clobber=True)
    yield f"faulty://{tmp_path}/store"
    FaultyFiles.break_at, FaultyFiles.late, FaultyFiles.broken_reads = "", (), ""


def writer(text: str):
    def write(place: str) -> dict[str, FileEntry]:
        files = {"learner/rank_0.bin": text.encode() * 100, "learner/rank_0.json": text.encode()}
        return {name: write_file(place, name, [data]) for name, data in files.items()}

    return write


def save_steps(where: str, *numbers: int, keep: int = 10) -> None:
    for number in numbers:
        save(where, number, writer(f"step {number}"), state={"cursor": number}, keep=keep)


def files_of(url: str) -> set[str]:
    """Every file below a URL, by relative name."""
    system, root = places.file_system(url)
    system.invalidate_cache()
    return {path.removeprefix(root).strip("/") for path in system.find(root)}


def read(url: str, name: str) -> bytes:
    system, root = places.file_system(url)
    return system.cat_file(f"{root}/{name}")


def write(url: str, name: str, data: bytes) -> None:
    system, root = places.file_system(url)
    system.pipe_file(f"{root}/{name}", data)


def remove(url: str, name: str) -> None:
    system, root = places.file_system(url)
    system.rm_file(f"{root}/{name}")


def weights_of(url: str, step: int) -> str:
    [name] = [name for name in files_of(url) if name.startswith(f"step_{step}/") and name.endswith("rank_0.bin")]
    return name


def test_saves_loads_and_prunes(url: str, tmp_path: Path) -> None:
    assert load_latest(url) is None
    save_steps(url, 1, 2, 3, 10, keep=2)
    assert steps(url) == [10, 3]
    found = load_latest(url)
    assert found is not None and (found.step, found.state) == (10, {"cursor": 10})
    copy = fetch_file(found.place, "learner/rank_0.bin", found.files["learner/rank_0.bin"], tmp_path / "scratch")
    assert copy.read_bytes() == b"step 10" * 100
    assert read(url, LATEST) == b"step_10\n"
    assert {name.split("/")[0] for name in files_of(url)} == {LATEST, "step_10", "step_3"}


def test_the_same_step_again_replaces_and_never_writes_over_files(url: str) -> None:
    save_steps(url, 1, 2)
    first = weights_of(url, 2)
    save(url, 2, writer("again"), state={"cursor": -2}, keep=3)
    found = load_latest(url)
    assert found is not None and found.state == {"cursor": -2}
    assert weights_of(url, 2) != first, "the second one wrote elsewhere, and the first one's files are gone"


def test_the_manifest_comes_last(url: str) -> None:
    """A driver that is killed before it leaves files, and no checkpoint."""
    save_steps(url, 1)
    writer("half")(begin(url, 2, keep=1))
    assert steps(url) == [1]
    events: list[tuple[str, Any]] = []
    found = load_latest(url, on_event=lambda kind, fields: events.append((kind, fields["path"])))
    assert found is not None and found.step == 1
    assert events == [("checkpoint_unfinished", f"{url}/step_2")]
    assert not [name for name in files_of(url) if name.startswith("step_2/")]


DAMAGE = {
    "flipped byte": ("weights", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "altered bytes"),
    "truncated file": ("weights", lambda data: data[:5], "of 5 bytes instead of"),
    "manifest truncated": (MANIFEST, lambda data: data[:40], "no readable manifest"),
    "manifest flipped": (MANIFEST, lambda data: data.replace(b'"size": 6', b'"size": 7'), "altered manifest"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_an_older_one_takes_over(url: str, damage: str) -> None:
    save_steps(url, 1, 2)
    what, change, expected = DAMAGE[damage]
    name = weights_of(url, 2) if what == "weights" else f"step_2/{what}"
    write(url, name, change(read(url, name)))
    events: list[tuple[str, dict[str, Any]]] = []
    found = load_latest(url, on_event=lambda kind, fields: events.append((kind, dict(fields))))
    assert found is not None and found.step == 1
    assert [kind for kind, _ in events] == ["checkpoint_rejected", "checkpoint_pointer_mended"]
    assert expected in events[0][1]["found"]
    assert events[0][1]["path"] == f"{url}/step_2/BAD.json"
    assert steps(url) == [1]
    assert load_latest(url) is not None
    assert weights_of(url, 2), "the bad one is kept for a look at it"
    save_steps(url, 2)
    again = load_latest(url)
    assert again is not None and again.step == 2


@pytest.mark.parametrize("name", ["weights", MANIFEST])
def test_a_missing_file_is_found(url: str, name: str) -> None:
    save_steps(url, 1, 2)
    remove(url, weights_of(url, 2) if name == "weights" else f"step_2/{name}")
    found = load_latest(url)
    assert found is not None and found.step == 1


def test_dangling_pointers(url: str) -> None:
    write(url, LATEST, b"step_9\n")
    with pytest.raises(CheckpointError, match="LATEST but no checkpoint"):
        load_latest(url)
    save_steps(url, 1)
    write(url, LATEST, b"step_9\n")
    found = load_latest(url)
    assert found is not None and found.step == 1
    assert read(url, LATEST) == b"step_1\n"


def test_none_good_is_an_error_and_nothing_moves(url: str) -> None:
    save_steps(url, 1, 2)
    for step in (1, 2):
        write(url, weights_of(url, step), b"other")
    with pytest.raises(CheckpointError, match="step_2 with .*; step_1 with"):
        load_latest(url)
    assert steps(url) == [2, 1]


def test_the_best_is_tracked_and_never_pruned(url: str) -> None:
    assert open_best(url) is None
    for number, value in [(1, 0.5), (2, 0.9), (3, 0.1)]:
        save_steps(url, number, keep=1)
        mark_best(url, number, "reward", value)
    assert steps(url) == [3, 2]
    best = open_best(url)
    assert best is not None and best.step == 2 and first_fault(best) == ""
    write(url, BEST, b"{")
    assert open_best(url) is None
    assert f"bad-{BEST}" in files_of(url)


@pytest.mark.parametrize("part", ["rank_0.bin", "state.json", MANIFEST, LATEST])
def test_an_upload_that_breaks_is_a_typed_error_and_the_old_one_stays(faulty: str, part: str) -> None:
    save_steps(faulty, 1)
    FaultyFiles.break_at = part
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_steps(faulty, 2, keep=2)
    assert "earlier checkpoints are intact" in caught.value.action
    FaultyFiles.break_at = ""
    found = load_latest(faulty)
    assert found is not None and first_fault(found) == ""
    assert found.step == (2 if part == LATEST else 1), "once the manifest is there, so is the checkpoint"
    save_steps(faulty, 3)
    again = load_latest(faulty)
    assert again is not None and again.step == 3


def test_a_pruning_that_breaks_leaves_no_half_checkpoint(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(faulty, 1)

    def killed(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(FaultyFiles, "rm", killed)
        with pytest.raises(CheckpointError, match="the network is gone"):
            save_steps(faulty, 2, keep=1)
    assert steps(faulty) == [2], "its manifest went first"
    events: list[str] = []
    found = load_latest(faulty, on_event=lambda kind, fields: events.append(fields["path"]))
    assert found is not None and found.step == 2
    assert events == [f"{faulty}/step_1"] and not [name for name in files_of(faulty) if name.startswith("step_1/")]


@pytest.mark.parametrize("late", ["step_2", "rank_0.bin", MANIFEST])
def test_a_late_listing_hides_nothing(faulty: str, late: str) -> None:
    """The pointer and the manifest are asked for by name, and so is each file that a manifest names."""
    save_steps(faulty, 1, 2)
    FaultyFiles.late = (late,)
    events: list[str] = []
    found = load_latest(faulty, on_event=lambda kind, fields: events.append(kind))
    assert found is not None and found.step == 2
    assert events == []
    assert steps(faulty)[0] == 2


def test_a_store_that_does_not_answer_is_no_damage(faulty: str) -> None:
    """A network that is gone for a while must not cost the newest checkpoint."""
    save_steps(faulty, 1, 2)
    FaultyFiles.broken_reads = "rank_0.bin"
    with pytest.raises(CheckpointError, match="the network is gone") as caught:
        load_latest(faulty)
    assert "Nothing was changed" in caught.value.action
    FaultyFiles.broken_reads = ""
    found = load_latest(faulty)
    assert found is not None and found.step == 2


SAVER = """
import sys
from rlhf.runs.checkpoint import load_latest, save
from rlhf.runs.places import write_file
url = sys.argv[1]
checkpoint = load_latest(url)
step = checkpoint.step if checkpoint else 0
print("ready", flush=True)
while True:
    step += 1
    def write(place):
        data = step.to_bytes(4, "big") * 40_000
        return {f"rank_{rank}.bin": write_file(place, f"rank_{rank}.bin", [data]) for rank in range(4)}
    save(url, step, write, state={"step": step}, keep=2)
    print(step, flush=True)
"""


def test_killed_inside_a_save_at_random_moments(tmp_path: Path) -> None:
    """A process that does nothing but save is killed six times; the last confirmed checkpoint, or a newer, is there."""
    url = f"file://{tmp_path}/store"
    confirmed = 0
    for number in range(6):
        process = subprocess.Popen([sys.executable, "-c", SAVER, url], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.01 + 0.013 * number)
        process.kill()
        printed = process.stdout.read().split()
        process.wait(timeout=30)
        process.stdout.close()
        confirmed = max([confirmed, *(int(text) for text in printed if text.isdigit())])
        found = load_latest(url)
        if found is None:
            assert confirmed == 0
            continue
        assert found.step >= confirmed and found.state == {"step": found.step}
        confirmed = found.step
    assert confirmed >= 1


def test_manifests_say_where_their_files_are(url: str) -> None:
    save_steps(url, 4)
    manifest = json.loads(read(url, f"step_4/{MANIFEST}"))
    assert manifest["format"] == 2 and manifest["step"] == 4
    assert set(manifest["files"]) == {"learner/rank_0.bin", "learner/rank_0.json", "state.json"}
    place = storage_at(url).place(4, manifest["folder"])
    assert place.startswith(f"{url}/step_4/") and manifest["folder"]
