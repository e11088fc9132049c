"""Twenty kills inside saves, and damage to what was saved: a run goes on from the newest good checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.runs import checkpoint
from rlhf.runs.events import read_events
from rlhf.runs.files import TEMPORARY
from tests.drills.small_run import STAGE
from tests.drills.small_runs import small_run

KILLS, MOST_TRIES = 20, 200


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.timeout(600)
def test_twenty_kills_inside_saves_lose_no_more_than_the_save(tmp_path: Path, tell: Callable[..., None]) -> None:
    """SIGKILL at a random moment of a save, until twenty have come inside one.

    Passes if every next process resumes by itself from the last save that had returned or from the one that was under
    way, whole, and what the killed ones left is gone in the end.
    """
    rng = random.Random(7)
    folder, inside, lost, recovered = tmp_path / "run", 0, 0, 0.0
    saved = saving = 0
    for _ in range(MOST_TRIES):
        with small_run(folder) as run:
            assert run.resumed >= 0, run.said()
            assert run.resumed in (saved, saving), f"resumed from {run.resumed} after {saved} and {saving}"
            lost, recovered = max(lost, saving - run.resumed), max(recovered, run.resumed_in_s)
            began = time.monotonic()
            run.do("save")
            took = time.monotonic() - began
            saved = run.resumed + 1
            run.ask("save")
            assert run.read() == f"begin save {saved + 1}"
            saving = saved + 1
            time.sleep(rng.uniform(0.0, took))
            run.process.send_signal(signal.SIGKILL)
            if run.read() == f"done save {saving}":
                saved = saving
            else:
                inside += 1
        if inside == KILLS:
            break
    assert inside == KILLS, f"only {inside} kills came inside a save"
    with small_run(folder) as run:
        assert run.resumed in (saved, saving)
        run.do("save")
        assert run.end() == 0
    left = sorted(path.name for path in (folder / "checkpoints" / STAGE).iterdir())
    assert not [name for name in left if name.startswith((TEMPORARY, "bad-"))], left
    tell("20 kills inside a save (the slowest)", recover_s=recovered, lost_steps=lost)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _remove_manifests(folder: Path) -> None:
    found = [path for path in folder.rglob("*") if checkpoint.MANIFEST in path.name]
    assert found
    for path in found:
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte in the newest checkpoint": (lambda newest: _flip(largest(newest)), "checkpoint_rejected"),
    "a truncated shard of the newest checkpoint": (
        lambda newest: os.truncate(largest(newest), largest(newest).stat().st_size // 2),
        "checkpoint_rejected",
    ),
    "no manifest in the newest checkpoint": (_remove_manifests, "checkpoint_rejected"),
    "a pointer to a checkpoint that is not there": (
        lambda newest: (newest.parent / checkpoint.LATEST).write_text("step_999\n"),
        "checkpoint_pointer_mended",
    ),
    "no pointer": (lambda newest: (newest.parent / checkpoint.LATEST).unlink(), "checkpoint_pointer_mended"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_costs_the_damaged_checkpoint_only(fault: str, tmp_path: Path, tell: Callable[..., None]) -> None:
    """A run of four steps ends; what it saved last is damaged; the same command is run again.

    Passes if it resumes from the newest good checkpoint, which is one step back at most, its events say what was
    wrong, and it saves again.
    """
    folder = tmp_path / "run"
    with small_run(folder) as run:
        run.do(*["save"] * 4)
        assert run.end() == 0
    damage, kind = DAMAGE[fault]
    saved = folder / "checkpoints" / STAGE
    damage(saved / "step_4")
    began = time.time()
    with small_run(folder) as run:
        expected = 3 if kind == "checkpoint_rejected" else 4
        assert run.resumed == expected, run.said()
        [told] = [event for event in read_events(folder / "events.jsonl") if event["kind"] == kind]
        run.do(*["save"] * (6 - run.resumed))
        assert run.end() == 0
        recover_s = run.resumed_in_s
    found = checkpoint.load_latest(saved)
    assert found is not None and found.step == 6
    tell(fault, detect_s=told["time"] - began, recover_s=recover_s, lost_steps=4 - expected)


def test_a_run_never_starts_over_where_all_checkpoints_are_damaged(tmp_path: Path, tell: Callable[..., None]) -> None:
    """Every checkpoint is damaged.

    Passes if the command ends with 1 and one line that names them, touches none of them, and goes on as soon as a copy
    of one is put back.
    """
    folder, copy = tmp_path / "run", tmp_path / "copy"
    with small_run(folder) as run:
        run.do("save", "save")
        assert run.end() == 0
    saved = folder / "checkpoints" / STAGE
    shutil.copytree(saved / "step_2", copy)
    for step in (1, 2):
        _flip(largest(saved / f"step_{step}"))
    before = sorted(path.name for path in saved.iterdir())
    began = time.monotonic()
    with small_run(folder) as run:
        assert run.end() == 1
        assert run.said().startswith("CheckpointError: ") and len(run.said().splitlines()) == 1
        assert "step_1" in run.said() and "step_2" in run.said()
        detect_s = time.monotonic() - began
    assert sorted(path.name for path in saved.iterdir()) == before
    assert not [event for event in read_events(folder / "events.jsonl") if event["kind"] == "stage_resumed"]
    shutil.rmtree(saved / "step_2")
    shutil.copytree(copy, saved / "step_2")
    with small_run(folder) as run:
        assert run.resumed == 2
        recover_s = run.resumed_in_s
        assert run.end() == 0
    tell("every checkpoint is damaged", detect_s=detect_s, recover_s=recover_s, lost_steps=0)
