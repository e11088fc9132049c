"""What every test session shares: a clean environment, a tiny model, order of the tests, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

# Here, and not with the drills: where tests go on side by side, the process that reports does not look for them.
pytest_plugins = ["tests.drills.table"]

ROOT = Path(__file__).resolve().parent.parent
SESSION_MARK = "RLHF_TEST_SESSION"
EXIT_GRACE_SECONDS = 20.0

# Set before anything is imported, so that every process the tests start inherits it.
os.environ[SESSION_MARK] = uuid.uuid4().hex
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_DO_NOT_TRACK="1",
    DO_NOT_TRACK="1",
    NO_PROXY="localhost,127.0.0.1",
    no_proxy="localhost,127.0.0.1",
)
# Tools keep what they compile and convert inside the working tree, not in the home directory.
for _name, _folder in {
    "RLHF_CACHE": "rlhf",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "VLLM_CACHE_ROOT": "vllm",
}.items():
    os.environ.setdefault(_name, str(ROOT / ".cache" / _folder))

# A property holds however long a machine takes over it.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

_complaints: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-early", action="store_true", help="start no engine test once a cheaper test has failed")


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


def _tier(item: pytest.Item) -> int:
    """0 for tests of pure code, 1 for engine tests, 2 for long ones."""
    if item.get_closest_marker("slow"):
        return 2
    return 1 if item.get_closest_marker("engine") or item.get_closest_marker("gpu") else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_tier)
    if not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; this machine has none"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    if item.config.getoption("--fail-early") and _tier(item) and item.session.testsfailed:
        raise item.session.Failed("a cheaper test failed, so engine tests were not started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "gpu" not in report.keywords and not hasattr(report, "wasxfail"):
        _complaints.append(f"{report.nodeid} was skipped; only a test marked gpu may be")


def _left_behind() -> list[psutil.Process]:
    """Processes that this session started, directly or through others, and that still run."""
    mark, here, found = os.environ[SESSION_MARK], os.getpid(), []
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == here or process.status() == psutil.STATUS_ZOMBIE:
                continue
            ours = process.pid in children or process.environ().get(SESSION_MARK) == mark
            command = process.cmdline()
            helpers = ("resource_tracker", "forkserver")  # multiprocessing's own: they end with this process
            if ours and not any(helper in part for part in command for helper in helpers):
                found.append(process)
    return found


@pytest.hookimpl(trylast=True)  # after the session's fixtures, which a session that ends early has still to close
def pytest_sessionfinish(session: pytest.Session) -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    deadline = time.monotonic() + EXIT_GRACE_SECONDS
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(psutil.Error):
            _complaints.append(f"process {process.pid} was left behind: {' '.join(process.cmdline())[:160]}")
            process.kill()
    if hasattr(session.config, "workeroutput"):  # tests go on side by side, and this is not the process that reports
        session.config.workeroutput["complaints"] = _complaints
    if _complaints and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {}).get("complaints", [])  # a process that crashed has told nothing
    _complaints.extend(complaint for complaint in told if complaint not in _complaints)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for complaint in _complaints:
        terminalreporter.write_line(f"FAILED {complaint}", red=True)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two-layer Llama and tokenizer of ``tests/tiny.py``, in float32, seed 0."""
    from tests.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private cluster of four CPUs for the session, started as a run starts its own."""
    from cluster.placement import connect, disconnect

    connect(None, num_cpus=4, object_store_bytes=200 * 2**20)
    yield
    disconnect()
