"""The doctor's own small run, for real: Ray, vLLM, DeepSpeed and a publication between them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.doctor.trial import check_trial
from tests.e2e import recipes


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_small_run_goes_through_on_this_machine(tmp_path: Path) -> None:
    before = set(recipes.runtime_processes())
    checks = check_trial(0, None, tmp_path)
    assert [check.found for check in checks if not check.ok] == []
    names = [check.name.removeprefix("trial: ") for check in checks]
    assert names == ["model", "Ray", "generation", "update", "publication", "end"]
    assert "2 updates" in checks[3].found
    assert list(tmp_path.iterdir()) == [], "its files are gone"
    left = set(recipes.runtime_processes()) - before
    deadline = time.monotonic() + 120  # Ray's agents take a while to end
    while left & set(recipes.runtime_processes()):
        assert time.monotonic() < deadline, "its processes are still there"
        time.sleep(0.5)
