"""No engine outlives its owner, however the owner ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]


def _gone(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


CHILD = """
import os, time
from actors.vllm.watchdog import arm_from_environment
armed = arm_from_environment()
print(armed, flush=True)
time.sleep(60)
"""


def _watching(owner: int) -> subprocess.Popen[str]:
    environment = os.environ | {"RLHF_ENGINE_OWNER": str(owner)}
    return subprocess.Popen([sys.executable, "-c", CHILD], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_process_ends_with_its_owner():
    owner = subprocess.Popen(["sleep", "60"])
    child = _watching(owner.pid)
    assert child.stdout is not None and child.stdout.readline().strip() == "True"
    assert child.poll() is None
    owner.kill()
    assert child.wait(5) == -signal.SIGKILL
    owner.wait()


def test_a_process_ends_where_its_owner_was_gone_already():
    owner = subprocess.Popen(["true"])
    owner.wait()
    assert _watching(owner.pid).wait(20) == -signal.SIGKILL


def test_a_process_without_an_owner_watches_nothing(monkeypatch):
    from actors.vllm.watchdog import OWNER_VARIABLE, arm_from_environment

    monkeypatch.delenv(OWNER_VARIABLE, raising=False)
    assert not arm_from_environment()
    monkeypatch.setenv(OWNER_VARIABLE, str(os.getpid()))
    assert not arm_from_environment()


@pytest.mark.engine
def test_the_engine_ends_when_its_owner_is_killed(tiny_model_dir: Path):
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.actors.vllm.owner", str(tiny_model_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert owner.stdout is not None
        words: list[str] = []
        while words[:1] != ["processes"]:
            line = owner.stdout.readline()
            assert line, "the owner ended before its engine was ready"
            words = line.split()
        processes = [int(word) for word in words[1:]]
        assert processes and all(psutil.pid_exists(pid) for pid in processes)
        owner.kill()
        owner.wait()
        assert all(_gone(pid, 10.0) for pid in processes)
    finally:
        owner.kill()
        owner.wait()
