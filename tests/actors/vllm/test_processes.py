from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from actors.vllm.config import EngineConfig
from actors.vllm.processes import Cores, descendants, end_processes, engine_environment, restored_environment
from actors.vllm.watchdog import OWNER_VARIABLE
from rlhf.config import validate
from rlhf.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def test_the_environment_comes_back_as_it_was(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with restored_environment({"OMP_NUM_THREADS": "2", OWNER_VARIABLE: "1"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ[OWNER_VARIABLE]) == ("2", "1")
        os.environ["LD_PRELOAD_OF_SOMEBODY"] = "x"
        del os.environ["PATH"]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("cores", "threads", "affinity"),
    [(Cores(threads=2), "2", None), (Cores(ids=(1, 3, 4)), "3", "1 3 4"), (Cores(threads=1, ids=(0, 1)), "1", "0 1")],
)
def test_threads_and_cores_reach_the_engine(cores, threads, affinity):
    variables = engine_environment(cores, start_timeout_s=30.0)
    assert variables["OMP_NUM_THREADS"] == threads
    assert variables.get("GOMP_CPU_AFFINITY") == affinity
    assert variables[OWNER_VARIABLE] == str(os.getpid())


def test_without_cores_all_of_them_are_used():
    assert Cores().num_threads == len(os.sched_getaffinity(0))


def test_processes_that_do_not_end_are_ended():
    stubborn = subprocess.Popen(["sleep", "60"])
    assert stubborn.pid in descendants()
    asyncio.run(end_processes([stubborn.pid, 2**22 - 1], 5.0))  # the other one does not exist
    assert not psutil.pid_exists(stubborn.pid)


def test_the_engine_classes_are_imported_without_vllm():
    code = "import sys, actors.generation, actors.judge; print(any(m in sys.modules for m in ('vllm', 'torch', 'ray')))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_engine_settings_are_checked():
    with pytest.raises(ConfigError, match="max_num_seqs"):
        validate(EngineConfig, {"max_num_seqs": 0}, "engine")
    with pytest.raises(ConfigError, match="Did you mean 'enforce_eager'"):
        validate(EngineConfig, {"enforce_eagre": True}, "engine")
