"""Drives ``small_run`` from a test, line by line."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.recipes import ROOT


class SmallRun:
    """One process of ``small_run``.

    Attributes:
        process: It.
        resumed: The step that it resumed from.
        resumed_in_s: Seconds from its start until it had.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        # Not beside the folder: its disk may be full.
        self._errors = tempfile.NamedTemporaryFile("w", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.drills.small_run", str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        said = self.read()
        self.resumed_in_s = time.monotonic() - began
        self.resumed = int(said.split()[1]) if said else -1

    def read(self) -> str:
        """Its next line; empty where it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, *commands: str) -> None:
        """Gives it lines to follow, without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{command}\n" for command in commands))
        self.process.stdin.flush()

    def do(self, *commands: str) -> None:
        """Has it follow lines to their end."""
        for command in commands:
            self.ask(command)
            assert self.read().startswith(f"begin {command}"), self.said()
            assert self.read().startswith(f"done {command}"), self.said()

    def end(self, timeout_s: float = 60.0) -> int:
        """Ends its input and returns its exit code."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait(timeout_s)

    def said(self) -> str:
        """What it printed as errors so far."""
        self._errors.flush()
        return Path(self._errors.name).read_text(encoding="utf-8")

    def close(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.wait(60.0)
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def small_run(folder: Path) -> Iterator[SmallRun]:
    """A process for the length of a block."""
    run = SmallRun(folder)
    try:
        yield run
    finally:
        run.close()
