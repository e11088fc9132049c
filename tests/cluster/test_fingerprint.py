"""Fingerprints: the same worker has the same one in another process, and whatever changes it changes the print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.store import RayStore
from actors.vllm.config import EngineConfig
from actors.vllm.processes import Cores
from cluster import fingerprint as module
from cluster.fingerprint import fingerprint
from cluster.topology import Resources
from rlhf.sampling import SamplingConfig

SAME = """
import sys
from pathlib import Path
from cluster.topology import Resources
from tests.cluster.test_fingerprint import Worker, arguments
from cluster.fingerprint import fingerprint
print(fingerprint(Worker, arguments(Path(sys.argv[1])), Resources()))
"""


class Worker:
    """No one is started."""


class Other:
    """Neither."""


def arguments(model: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "model": model,
        "engine": EngineConfig(),
        "sampling": SamplingConfig(max_tokens=8),
        "store": RayStore(),
        "cores": Cores(2),
        "names": {"b": 1, "a": [2.0, None]},
    }
    return given | changes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_it_is_the_same_in_another_process(model: Path) -> None:
    command = [sys.executable, "-c", SAME, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == fingerprint(Worker, arguments(model), Resources()), done.stderr[-2000:]


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": EngineConfig(max_num_seqs=3)},
        {"sampling": SamplingConfig(max_tokens=9)},
        {"store": RayStore("another owner")},
        {"cores": Cores(1)},
        {"names": {"b": 1, "a": [2.5, None]}},
        {"what": object()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_argument_makes_another_one(changes: dict[str, Any], model: Path) -> None:
    plain = fingerprint(Worker, arguments(model), Resources())
    assert fingerprint(Worker, arguments(model, **changes), Resources()) != plain


def test_class_resources_code_and_files_count_and_timeouts_do_not(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fingerprint(Worker, arguments(model), Resources())
    assert fingerprint(Other, arguments(model), Resources()) != plain
    assert fingerprint(Worker, arguments(model), Resources(threads=2)) != plain
    assert fingerprint(Worker, arguments(model), Resources(call_timeout_s=1.0, max_restarts=9)) == plain
    monkeypatch.setattr(module, "code_version", lambda: "of tomorrow")
    assert fingerprint(Worker, arguments(model), Resources()) != plain
    monkeypatch.undo()
    os.utime(model / "config.json", ns=(1, 1))
    assert fingerprint(Worker, arguments(model), Resources()) != plain


def test_what_is_given_anew_does_not_count(model: Path, tmp_path: Path) -> None:
    prints = {
        fingerprint(Worker, arguments(path, version=version), Resources(), replaced=("model", "version"))
        for path, version in ((model, 0), (tmp_path / "elsewhere", 7))
    }
    assert len(prints) == 1
