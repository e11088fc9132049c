"""The rules of the test session itself: nothing is skipped quietly, nothing is left running, cheap tests go first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
MARKERS = "[pytest]\nmarkers =\n    engine: x\n    slow: x\n    gpu: x\n"


def run_session(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a session of its own with this project's conftest, and a short grace for processes to end."""
    text = CONFTEST.read_text(encoding="utf-8").replace("EXIT_GRACE_SECONDS = 20.0", "EXIT_GRACE_SECONDS = 0.5")
    assert "= 0.5" in text
    (folder / "conftest.py").write_text(text, encoding="utf-8")
    (folder / "pytest.ini").write_text(MARKERS, encoding="utf-8")
    (folder / "test_it.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CONFTEST.parents[1])}  # for the plugin that conftest names
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_skipped_test_fails_the_session_unless_it_needs_a_gpu(tmp_path):
    done = run_session(tmp_path, "import pytest\n@pytest.mark.skip\ndef test_a(): pass\n")
    assert done.returncode == 1
    assert "test_it.py::test_a was skipped" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["alone", "side by side"])
def test_a_process_left_behind_is_ended_and_fails_the_session(tmp_path, arguments):
    source = (
        "import subprocess, sys\n"
        "def test_a():\n"
        '    code = \'import subprocess; subprocess.Popen(["sleep", "321"], start_new_session=True)\'\n'
        "    subprocess.run([sys.executable, '-c', code], check=True)\n"  # an orphan: its parent is gone
    )
    done = run_session(tmp_path, source, *arguments)
    assert done.returncode == 1
    assert done.stdout.count("was left behind: sleep 321") == 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "321"]]


def test_cheap_tests_run_first_and_engines_are_spared_after_a_failure(tmp_path):
    source = (
        "import pytest\n"
        "@pytest.mark.slow\ndef test_long(): pass\n"
        "@pytest.mark.engine\ndef test_engine(): pass\n"
        "def test_cheap(): assert False\n"
    )
    done = run_session(tmp_path, source, "--fail-early", "-v")
    assert done.returncode != 0
    assert "test_cheap FAILED" in done.stdout
    assert "test_engine PASSED" not in done.stdout and "test_long PASSED" not in done.stdout
    source = source.replace("assert False", "pass") + "@pytest.mark.gpu\ndef test_gpu(): pass\n"
    done = run_session(tmp_path, source, "--fail-early", "-v", "-rs")
    order = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if "PASSED" in line]
    assert order[:3] == ["test_cheap", "test_engine", "test_long"]
    assert done.returncode == 0
    assert "needs an NVIDIA GPU" in done.stdout or "test_gpu" in order
    assert "3 passed" in done.stdout.splitlines()[-1] or "4 passed" in done.stdout.splitlines()[-1]
