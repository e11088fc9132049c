"""Peak memory of a run: the proportional set size (PSS) of all its processes, so that shared pages count once.

PSS divides every page by the number of processes that map it (Linux, ``/proc/PID/smaps_rollup``). Engine processes may
not descend from the driver, so those that carry the run's marker in their environment count as well.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from rlhf.runs.directory import RunDirectory
from rlhf.runs.files import read_json, write_json

RUN_MARK = "RLHF_RUN_MARKER"
"""Environment variable that every process of a run carries, engines' children included; its value names the run."""

_PROC = Path("/proc")


def run_processes(root_pid: int, marker: str = "") -> set[int]:
    """Ids of a process, all its descendants, and all processes whose ``RLHF_RUN_MARKER`` equals ``marker``."""
    children: dict[int, list[int]] = {}
    marked = set()
    wanted = f"{RUN_MARK}={marker}".encode()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        parent = _parent(entry)
        if parent is None:
            continue
        children.setdefault(parent, []).append(pid)
        if marker and wanted in _environment(entry):
            marked.add(pid)
    found: set[int] = set()
    waiting = [root_pid, *marked]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def _parent(entry: Path) -> int | None:
    try:
        stat = (entry / "stat").read_text(errors="replace")
    except OSError:
        return None  # it has ended meanwhile
    return int(stat.rpartition(")")[2].split()[1])  # the command's name may hold spaces and brackets


def _environment(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # another user's process, or one that has ended


def pss_bytes(pid: int) -> int:
    """PSS of one process in bytes; its resident size where the system hides the PSS; 0 where it has ended."""
    try:
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except PermissionError:
        return _resident_bytes(pid)
    except OSError:
        return 0
    return 0


def _resident_bytes(pid: int) -> int:
    try:
        pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def total_gib(root_pid: int, marker: str = "") -> float:
    """PSS in GiB of all processes of a run at this moment."""
    return sum(pss_bytes(pid) for pid in run_processes(root_pid, marker)) / 2**30


class MemorySampler:
    """Samples the memory of a run in a thread and keeps the peak. Use as a context manager.

    Args:
        root_pid: The driver; None is this process.
        marker: Value of ``RLHF_RUN_MARKER`` of processes that do not descend from the driver; empty looks for none.
        interval_s: Seconds between two samples; a peak that is shorter may be missed.
        initial_gib: The peak that earlier drivers of the same run saw.
    """

    def __init__(
        self, root_pid: int | None = None, *, marker: str = "", interval_s: float = 5.0, initial_gib: float = 0.0
    ) -> None:
        self._root_pid = os.getpid() if root_pid is None else root_pid
        self._marker = marker
        self._interval_s = interval_s
        self._peak = initial_gib
        self._last = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    @property
    def memory_gib(self) -> float:
        """The last sample; 0 before the first."""
        return self._last

    @property
    def peak_memory_gib(self) -> float:
        """The highest sample so far."""
        return self._peak

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> float:
        """Takes a last sample, ends the thread and returns the peak in GiB."""
        if not self._stop.is_set():
            self._sample()
        self._stop.set()
        self._thread.join(timeout=30.0)
        return self._peak

    def _sample(self) -> None:
        self._last = total_gib(self._root_pid, self._marker)
        self._peak = max(self._peak, self._last)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(self._interval_s)


def read_peak_memory(run: RunDirectory) -> float:
    """The highest memory that earlier drivers of this run saw, GiB."""
    path = run.root / "memory.json"
    return float(read_json(path)["peak_memory_gib"]) if path.is_file() else 0.0


def write_peak_memory(run: RunDirectory, peak_gib: float) -> None:
    """Keeps the highest memory for the summary and for the next driver."""
    write_json(run.root / "memory.json", {"peak_memory_gib": peak_gib})
