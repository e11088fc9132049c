from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


@pytest.fixture(scope="session")
def _shared_generation(tiny_model_dir: Path) -> Iterator[object]:
    from tests.actors.vllm.engines import RunningWorker

    running = RunningWorker(tiny_model_dir)
    processes = running.engine.processes
    yield running
    running.stop()
    assert processes and not any(psutil.pid_exists(pid) for pid in processes), "a stopped engine leaves no process"


@pytest.fixture
def generation(_shared_generation):
    """The session's one running generation worker, on the weights of ``tiny_model_dir``."""
    _shared_generation.reset()
    return _shared_generation
