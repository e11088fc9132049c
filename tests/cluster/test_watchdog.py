"""A killed driver's processes end, a dismissed watchdog leaves everything alone. No Ray in here."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.watchdog import CLUSTER_MARK, marked

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import os, subprocess, sys, time
from cluster.watchdog import CLUSTER_MARK, Watchdog

watchdog = Watchdog(sys.argv[1])
environment = os.environ | {CLUSTER_MARK: sys.argv[1]}
orphan = subprocess.Popen(["sleep", "300"], env=environment, start_new_session=True)
print(orphan.pid, flush=True)
if sys.argv[2] == "dismiss":
    watchdog.dismiss()
    watchdog.dismiss()
else:
    time.sleep(300)
"""


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """A mark of this test alone; what still carries it is ended."""
    yield str(tmp_path)
    for pid in marked(str(tmp_path)):
        psutil.Process(pid).kill()


def start(mark: str, end: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", DRIVER, mark, end]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    return driver, int(driver.stdout.readline())


def test_what_carries_the_mark_ends_with_a_killed_driver(mark: str) -> None:
    bystander = subprocess.Popen(["sleep", "300"], env={CLUSTER_MARK: mark + "-other"})
    driver, orphan = start(mark, "wait")
    assert marked(mark) == [orphan]
    [watchdog] = [child for child in psutil.Process(driver.pid).children() if child.pid != orphan]
    driver.kill()
    driver.wait(10)
    deadline = time.monotonic() + 60
    while marked(mark) or (watchdog.is_running() and watchdog.status() != psutil.STATUS_ZOMBIE):
        assert time.monotonic() < deadline, "what a killed driver left behind is still there"
        time.sleep(0.1)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait(10)


def test_a_driver_that_ends_by_itself_dismisses_it(mark: str) -> None:
    driver, orphan = start(mark, "dismiss")
    assert driver.wait(60) == 0
    assert marked(mark) == [orphan], "the driver ends its own processes; the watchdog ends none"
