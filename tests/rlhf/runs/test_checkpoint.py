"""A crash, an altered byte or a full disk never costs a good checkpoint, and never starts a run from scratch."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.errors import CheckpointError
from rlhf.runs.checkpoint import (
    BEST,
    LATEST,
    MANIFEST,
    Checkpoint,
    first_fault,
    load_latest,
    mark_best,
    open_best,
    open_step,
    reject_best,
    save,
    steps,
)
from rlhf.runs.places import FileEntry, write_file


def writer(text: str):
    def write(place: str) -> dict[str, FileEntry]:
        files = {"rank_0/weights.bin": text.encode() * 100, "config.json": text.encode()}
        return {name: write_file(place, name, [data]) for name, data in files.items()}

    return write


def save_steps(folder: Path, *numbers: int, keep: int = 10) -> None:
    for number in numbers:
        save(folder, number, writer(f"step {number}"), state={"cursor": number}, keep=keep)


def test_saves_loads_and_prunes(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None
    save_steps(tmp_path, 1, 2, 3, 10, keep=2)
    assert steps(tmp_path) == [10, 3]
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (10, {"cursor": 10})
    assert (Path(checkpoint.place) / "rank_0" / "weights.bin").read_bytes() == b"step 10" * 100
    assert (tmp_path / LATEST).read_text() == "step_10\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [LATEST, "step_10", "step_3"]


def test_same_step_again_replaces(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    save(tmp_path, 2, writer("again"), state={"cursor": -2}, keep=3)
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.state == {"cursor": -2}
    assert (Path(checkpoint.place) / "config.json").read_text() == "again"


@pytest.mark.parametrize("keep, step", [(0, 1), (1, -1)])
def test_refuses_senseless_numbers(tmp_path: Path, keep: int, step: int) -> None:
    with pytest.raises(ValueError):
        save(tmp_path, step, writer("x"), state={}, keep=keep)


def test_failed_writer_leaves_no_litter(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)

    def write(place: str) -> dict[str, FileEntry]:
        write_file(place, "half", [b"x"])
        raise RuntimeError("rank 1 died")

    with pytest.raises(RuntimeError, match="rank 1 died"):
        save(tmp_path, 2, write, state={}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LATEST, "step_1"]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a": FileEntry(3, "0")}, "b, which the manifest does not list"),
        ({"a": FileEntry(3, "0"), "b": FileEntry(4, "0")}, "b of 3 bytes instead of 4"),
        ({"a": FileEntry(3, "0"), "b": FileEntry(3, "0"), "c": FileEntry(3, "0")}, "c missing"),
    ],
)
def test_what_lies_there_has_to_be_what_the_writers_say(
    tmp_path: Path, entries: dict[str, FileEntry], expected: str
) -> None:
    save_steps(tmp_path, 1)

    def write(place: str) -> dict[str, FileEntry]:
        for name in ("a", "b"):
            write_file(place, name, [b"abc"])
        return entries

    with pytest.raises(CheckpointError, match=expected):
        save(tmp_path, 2, write, state={}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LATEST, "step_1"]


def test_a_save_reads_no_file_again(tmp_path: Path) -> None:
    """The digests are the writers' own: one that lied is found out by whoever reads."""

    def write(place: str) -> dict[str, FileEntry]:
        written = write_file(place, "a", [b"ab", memoryview(b"c")])
        assert written == FileEntry(3, hashlib.blake2b(b"abc", digest_size=32).hexdigest())
        return {"a": FileEntry(3, "0" * 64)}

    saved = save(tmp_path, 1, write, state={}, keep=1)
    assert open_step(tmp_path, 1) == saved
    assert first_fault(saved) == "a with altered bytes"


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped byte": (lambda p: flip_byte(p / "rank_0" / "weights.bin"), "altered bytes"),
    "truncated file": (lambda p: os.truncate(p / "rank_0" / "weights.bin", 5), "of 5 bytes instead of"),
    "empty file": (lambda p: os.truncate(p / "config.json", 0), "of 0 bytes"),
    "file missing": (lambda p: (p / "config.json").unlink(), "config.json missing"),
    "file added": (lambda p: (p / "extra").write_text("x"), "does not list"),
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), "no readable manifest"),
    "manifest truncated": (lambda p: os.truncate(p / MANIFEST, 40), "no readable manifest"),
    "manifest flipped": (lambda p: flip_byte(p / MANIFEST), "manifest"),
    "manifest of another step": (
        lambda p: (p / MANIFEST).write_text((p.parent / "step_1" / MANIFEST).read_text()),
        "a manifest of step 1",
    ),
    "link": (lambda p: (p / "link").symlink_to("/etc/passwd"), "symbolic link"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_an_older_one_takes_over(tmp_path: Path, damage: str) -> None:
    save_steps(tmp_path, 1, 2)
    hurt, expected = DAMAGE[damage]
    hurt(tmp_path / "step_2")
    events: list[tuple[str, dict]] = []
    checkpoint = load_latest(tmp_path, on_event=lambda kind, fields: events.append((kind, dict(fields))))
    assert checkpoint is not None and checkpoint.step == 1
    assert [kind for kind, _ in events] == ["checkpoint_rejected", "checkpoint_pointer_mended"]
    assert expected in events[0][1]["found"]
    assert (tmp_path / "bad-step_2").is_dir(), "the bad one is kept for inspection"
    save_steps(tmp_path, 2)
    again = load_latest(tmp_path)
    assert again is not None and again.step == 2


def test_which_checkpoint_is_good_is_for_its_readers_to_say(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    asked: list[int] = []

    def verify(candidate: Checkpoint) -> str:
        asked.append(candidate.step)
        return "" if candidate.step == 1 else f"rank 1: bytes of step {candidate.step} altered"

    (tmp_path / "step_2" / "config.json").write_text("short")  # nobody is asked about what is plainly incomplete
    events: list[str] = []
    found = load_latest(tmp_path, verify, on_event=lambda kind, fields: events.append(str(fields["found"])))
    assert found is not None and found.step == 1 and asked == [3, 1]
    assert events == ["rank 1: bytes of step 3 altered", "config.json of 5 bytes instead of 6", "step_3"]
    assert found.below("rank_0") == {"weights.bin": found.files["rank_0/weights.bin"]}


def test_none_good_is_an_error_and_nothing_moves(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for number in (1, 2):
        flip_byte(tmp_path / f"step_{number}" / "config.json")
    with pytest.raises(CheckpointError, match="step_2 with config.json with altered bytes; step_1 with") as caught:
        load_latest(tmp_path)
    assert "remove this directory" in caught.value.action
    assert steps(tmp_path) == [2, 1]


def test_dangling_pointer(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / LATEST).write_text("step_9\n")
    events = []
    checkpoint = load_latest(tmp_path, on_event=lambda kind, fields: events.append((kind, fields["found"])))
    assert checkpoint is not None and checkpoint.step == 1
    assert events == [("checkpoint_pointer_mended", "step_9")]
    assert (tmp_path / LATEST).read_text() == "step_1\n"


def test_pointer_without_any_checkpoint_is_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / LATEST).write_text("step_9\n")
    with pytest.raises(CheckpointError, match="LATEST but no checkpoint"):
        load_latest(tmp_path)


def test_missing_pointer_loses_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / LATEST).unlink()
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2


def test_leftovers_are_cleaned_and_a_replaced_one_comes_back(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / ".tmp-step_3-77").mkdir()
    (tmp_path / ".tmp-step_3-77" / "half").write_text("x")
    os.rename(tmp_path / "step_2", tmp_path / ".old-step_2")  # killed between the two renames
    (tmp_path / ".tmp-pruned-step_0").mkdir()  # killed while it was removed: nothing is missing there
    events: list[tuple[str, str]] = []
    checkpoint = load_latest(tmp_path, on_event=lambda kind, fields: events.append((kind, fields["path"])))
    assert checkpoint is not None and checkpoint.step == 2
    assert events == [("checkpoint_unfinished", str(tmp_path / ".tmp-step_3-77"))]
    assert sorted(p.name for p in tmp_path.iterdir()) == [LATEST, "step_1", "step_2"]


def test_best_is_tracked_and_never_pruned(tmp_path: Path) -> None:
    assert open_best(tmp_path) is None
    won = []
    for number, value in [(1, 0.5), (2, 0.9), (3, 0.9), (4, float("nan")), (5, 0.2)]:
        save_steps(tmp_path, number, keep=1)
        won.append(mark_best(tmp_path, number, "reward", value))
    assert won == [True, True, False, False, False]
    assert steps(tmp_path) == [5, 2]
    best = open_best(tmp_path)
    assert best is not None and best.step == 2
    assert json.loads((tmp_path / BEST).read_text()) == {"step": 2, "metric": "reward", "value": 0.9}
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        mark_best(tmp_path, 99, "reward", 2.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"step": 1}',
        '{"step": "1", "metric": "reward", "value": 1.0}',
        '{"step":1,"metric":"r","value":NaN}',
    ],
)
def test_a_damaged_best_pointer_costs_the_choice_and_not_the_training(tmp_path: Path, text: str) -> None:
    save_steps(tmp_path, 1, 2)
    mark_best(tmp_path, 1, "reward", 0.5)
    (tmp_path / BEST).write_text(text)
    save_steps(tmp_path, 3)  # pruning reads the pointer
    events: list[tuple[str, Path]] = []
    assert open_best(tmp_path, on_event=lambda kind, fields: events.append((kind, Path(fields["path"])))) is None
    assert events == [("checkpoint_rejected", tmp_path / f"bad-{BEST}")]
    assert (tmp_path / f"bad-{BEST}").read_text() == text
    assert open_best(tmp_path) is None
    assert mark_best(tmp_path, 3, "reward", 0.1)
    best = open_best(tmp_path)
    assert best is not None and best.step == 3


@pytest.mark.parametrize("found_by", ["size", "digest"])
def test_a_damaged_best_checkpoint_is_set_aside_and_the_last_weights_are_taken(tmp_path: Path, found_by: str) -> None:
    save_steps(tmp_path, 1, 2)
    mark_best(tmp_path, 1, "reward", 0.5)
    (tmp_path / "step_1" / "config.json").write_text("step 7" if found_by == "digest" else "step")
    events: list[Path] = []

    def on_event(kind: str, fields) -> None:
        events.append(Path(fields["path"]))

    best = open_best(tmp_path, on_event=on_event)
    if found_by == "digest":  # the ranks that read it find it
        assert best is not None
        reject_best(tmp_path, best, first_fault(best), on_event=on_event)
    else:
        assert best is None
    assert events == [tmp_path / "bad-step_1"]
    assert steps(tmp_path) == [2]
    assert open_best(tmp_path, on_event=on_event) is None
    assert events[1:] == [tmp_path / f"bad-{BEST}"], "a pointer to nothing is set aside too"
    assert open_best(tmp_path) is None
    latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 2


def test_best_by_a_loss(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    assert mark_best(tmp_path, 1, "loss", 2.0, higher_is_better=False)
    assert mark_best(tmp_path, 2, "loss", 1.0, higher_is_better=False)
    assert not mark_best(tmp_path, 1, "loss", 1.5, higher_is_better=False)


def test_full_disk_is_a_typed_error_and_the_old_one_stays(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(place: str) -> dict[str, FileEntry]:
        return {"weights.bin": write_file(place, "weights.bin", [b"x" * 200_000])}

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="too large") as caught:
            save(tmp_path, 2, write, state={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Free space" in caught.value.action
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [LATEST, "step_1"]


def test_full_disk_while_the_manifest_is_written(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(CheckpointError):
            save(tmp_path, 2, lambda place: {"a": write_file(place, "a", [b"small"])}, state={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


DISK_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def killed_at_call(folder: Path, number: int) -> bool:
    """Saves step 2 over a step 2 in a child that kills itself at its n-th disk call; True if it was killed."""
    child = os.fork()
    if child == 0:
        left = number

        def counted(call):
            def wrapper(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        for name in DISK_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        save(folder, 2, writer("second"), state={"cursor": 22}, keep=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_every_disk_call_of_a_save(tmp_path: Path) -> None:
    """The hardest save: it replaces a checkpoint of its own step, moves the pointer and prunes an older one."""
    number, seen = 1, set()
    save_steps(tmp_path / "start", 1, 2)
    while True:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", folder)
        killed = killed_at_call(folder, number)
        checkpoint = load_latest(folder)
        assert checkpoint is not None and checkpoint.step == 2
        text = (Path(checkpoint.place) / "config.json").read_text()
        assert (text, checkpoint.state["cursor"]) in [("step 2", 2), ("second", 22)]
        seen.add(text)
        if not killed:
            break
        number += 1
    assert number > 15, "the save makes at least that many calls"
    assert seen == {"step 2", "second"}


SAVER = """
import sys
from pathlib import Path
from rlhf.runs.checkpoint import load_latest, mark_best, save, steps
from rlhf.runs.places import write_file
folder = Path(sys.argv[1])
checkpoint = load_latest(folder)
step = checkpoint.step if checkpoint else 0
print("ready", flush=True)
while True:
    step += 1
    def write(place):
        data = step.to_bytes(4, "big") * 40_000
        return {f"rank_{rank}.bin": write_file(place, f"rank_{rank}.bin", [data]) for rank in range(4)}
    save(folder, step, write, state={"step": step}, keep=2)
    if step % 3 == 0:
        save(folder, step, write, state={"step": step}, keep=2)
        mark_best(folder, step, "step", float(step))
    print(step, flush=True)
"""


def test_killed_inside_a_save_at_random_moments(tmp_path: Path) -> None:
    """Twenty processes are killed while they do nothing but save; a good checkpoint is always found, never an older one
    than the last that ``save`` had returned from."""
    rng = random.Random(0)
    confirmed = 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.01, 0.1))
        process.send_signal(signal.SIGKILL)
        printed = process.stdout.read().split()
        process.wait(timeout=30)
        process.stdout.close()
        confirmed = max([confirmed, *(int(text) for text in printed if text.isdigit())])
        checkpoint = load_latest(tmp_path)
        if checkpoint is None:
            assert confirmed == 0
            continue
        assert checkpoint.step >= confirmed
        assert checkpoint.state == {"step": checkpoint.step}
        for rank in range(4):
            assert (Path(checkpoint.place) / f"rank_{rank}.bin").read_bytes() == checkpoint.step.to_bytes(
                4, "big"
            ) * 40_000
        assert not [p for p in tmp_path.iterdir() if p.name.startswith((".tmp", ".old", "bad"))]
        confirmed = checkpoint.step
    assert confirmed >= 1
