"""Ends what a private cluster leaves behind when its driver is killed.

Most of Ray's processes end with the driver that started them. Two of its agents do not: they first try for a minute to
report the death of their node to a control store that died with it. A process of ours outlives the driver and ends
what still carries the cluster's mark. It is started by this file's path and needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CLUSTER_MARK = "RLHF_CLUSTER"
"""Environment variable that the processes of one private cluster carry; its value is that cluster's own."""

GRACE_S = 4.0
"""What Ray's processes and the engines get to end by themselves."""

LIMIT_S = 60.0
"""When the watchdog gives up on what cannot be ended."""


class Watchdog:
    """Watches the process that makes it, until ``dismiss``.

    Args:
        mark: Value of ``RLHF_CLUSTER`` of what is to end with this process.
    """

    def __init__(self, mark: str) -> None:
        command = [sys.executable, "-I", __file__, mark]
        # A session of its own: the terminal's Ctrl-C is for the driver. And none of the driver's pipes, whose readers
        # wait for the driver's end and not for this one's.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Ends the watch and leaves everything alone; may be called twice."""
        if self._process.poll() is None:
            try:
                self._process.communicate(b".", timeout=10.0)
            except subprocess.TimeoutExpired:  # the machine is too busy for it to read one byte
                self._process.kill()
                self._process.wait(10.0)

    def end_marked(self) -> None:
        """Ends what carries the mark now, as if this process had died; returns when it is done, at last after a while.

        For a cluster that did not come up: whoever started it has no handle of what it had started by then.
        """
        try:  # its input ends without the word that dismisses it
            self._process.communicate(timeout=GRACE_S + LIMIT_S + 10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10.0)


def marked(mark: str) -> list[int]:
    """Ids of this user's living processes that were started with the mark, without this one."""
    wanted = f"{CLUSTER_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # another user's, or ended meanwhile
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def watch(mark: str) -> None:
    """Waits until the driver dismisses this process or dies; in the latter case ends what carries the mark."""
    if sys.stdin.buffer.read(1):
        return
    time.sleep(GRACE_S)
    deadline = time.monotonic() + LIMIT_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


if __name__ == "__main__":
    watch(sys.argv[1])
