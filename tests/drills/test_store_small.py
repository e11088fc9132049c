"""The object store is smaller than what has to lie in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.drills.small_store import SIZES
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def outcome(folder: Path, **environment: str) -> dict[str, Any]:
    """What ``small_store`` says; it leaves no process behind."""
    before = set(recipes.runtime_processes())
    clean = {name: value for name, value in os.environ.items() if name not in recipes.MARKS}
    done = subprocess.run(
        [sys.executable, "-m", "tests.drills.small_store", str(folder)],
        cwd=recipes.ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(recipes.runtime_processes()) <= before
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(500)
def test_what_does_not_fit_goes_to_the_disk(tmp_path: Path, tell: Callable[..., None]) -> None:
    """A value larger than the store, and many that are so together, with room on the disk.

    Passes if each comes back as it was put.
    """
    found = outcome(tmp_path)
    for what in SIZES:
        assert found[what].get("sound"), found[what]
        tell(f"object store of 80 MiB: {what}", recover_s=found[what]["seconds"], lost_steps=0)


@pytest.mark.timeout(500)
def test_without_room_on_the_disk_it_is_an_error_that_says_what_to_raise(
    tmp_path: Path, tell: Callable[..., None]
) -> None:
    """The same while Ray takes the disk that it spills to for full.

    Passes if it is the typed error that names `ray.object_store_gib`, no process is left, and a value that fits is
    stored after that.
    """
    found = outcome(tmp_path, RAY_local_fs_capacity_threshold="0.000001")
    [large, _] = SIZES
    assert found[large]["error"].startswith("StoreFullError: object store, put: found OutOfDiskError"), found
    assert "Raise ray.object_store_gib" in found[large]["error"] and found[large]["exit_code"] == 1
    assert found["a small one"].get("sound"), found
    tell(f"object store of 80 MiB, the disk full too: {large}", detect_s=found[large]["seconds"])
