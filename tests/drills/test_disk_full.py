"""The disk is full in each writer of a run's record: one line, exit code 1, and everything before it as it was."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlhf.runs import checkpoint
from rlhf.runs.metrics import read_metrics
from rlhf.runs.tables import read_table
from tests.drills.small_run import STAGE
from tests.drills.small_runs import SmallRun, small_run

SIZE = "2m"
COMMANDS = {"record": "RecordError", "log": "RecordError", "save": "CheckpointError"}


@dataclass
class SmallDisk:
    """A folder whose room can be used up.

    Attributes:
        folder: It.
        mounted: Whether it is a file system of its own. Otherwise, where the user may mount nothing, a process is
            forbidden to make files any larger.
    """

    folder: Path
    mounted: bool
    _limits: list[tuple[int, int]] = field(default_factory=list)

    def fill(self, run: SmallRun) -> None:
        """Leaves no room for what the run writes next."""
        if not self.mounted:
            self._limits.append(resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE))
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (512, self._limits[-1][1]))
            return
        with contextlib.suppress(OSError), (self.folder / "ballast").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))

    def free(self) -> None:
        """Gives the room back to the runs after it."""
        (self.folder / "ballast").unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = mount is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield SmallDisk(folder, mounted)
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_costs_the_step_and_nothing_before_it(
    command: str, disk: SmallDisk, tell: Callable[..., None]
) -> None:
    """Two steps, then no room while the third is recorded, logged or saved; then room again.

    Passes if the process ends with 1 and one line that says to free space, all that was written before reads as it was
    to the last bit, and the same command goes on from the second step and completes the record.
    """
    folder = disk.folder / "run"
    with small_run(folder) as run:
        run.do(*["record", "log", "save"] * 2)
        run.do(*list(COMMANDS)[: list(COMMANDS).index(command)])
        before = contents(folder)
        disk.fill(run)
        asked = time.monotonic()
        run.ask(command)
        assert run.end() == 1, run.said()
        detect_s = time.monotonic() - asked
        said = run.said()
    assert said.startswith(f"{COMMANDS[command]}: ") and len(said.splitlines()) == 1, said
    assert "Free space" in said
    after = contents(folder)
    assert all(after[name][: len(data)] == data for name, data in before.items())
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3][: 2 + (command == "save")]

    disk.free()
    with small_run(folder) as run:
        assert run.resumed == 2, run.said()
        run.do("record", "log", "save")
        assert run.end() == 0
        recover_s = run.resumed_in_s
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    tables = sorted((folder / "rollouts").glob("*.parquet"))
    assert [{row["step"] for row in read_table(path)} for path in tables] == [{0}, {1}, {2}]
    found = checkpoint.load_latest(folder / "checkpoints" / STAGE)
    assert found is not None and found.step == 3
    names = {"record": "rollouts are", "log": "metrics are", "save": "a checkpoint is"}
    tell(f"the disk is full while {names[command]} written", detect_s=detect_s, recover_s=recover_s, lost_steps=1)


def test_a_line_of_which_the_disk_takes_a_part_is_an_error(tmp_path: Path) -> None:
    """A nearly full disk takes the beginning of a line without a word; the rest is what it refuses."""
    from rlhf.errors import RecordError
    from rlhf.runs.files import append_json_line, read_json_lines

    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(path).st_size + 10, before[1]))
    try:
        with pytest.raises(RecordError, match="Free space"):
            append_json_line(path, {"step": 2, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append_json_line(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]
