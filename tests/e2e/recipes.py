"""Small recipes on a tiny model, written into a test's folder and run by the real command in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.watchdog import CLUSTER_MARK
from rlhf.runs.events import read_events
from rlhf.runs.memory import RUN_MARK
from rlhf.runs.tables import read_table
from tests.actors.judging import write_constitution
from tests.conftest import SESSION_MARK

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = ("seconds", "per_second")
RUNTIME = ("ray::", "raylet", "gcs_server", "VLLM::", "multiprocessing.spawn")
MARKS = (RUN_MARK, CLUSTER_MARK)
"""What this process may carry of the session's own cluster. A run has marks of its own."""


def write_data(folder: Path, num_prompts: int = 16) -> None:
    """Prompts, and what people said: pairs and ranked lists with a tie, in turn."""
    requests = ["enthusiastic", "scathing"]
    rows = [
        {
            "uid": f"p/{i}",
            "request": requests[i % 2],
            "subject": f"the sea {i // 2}",
            "prompt": f"Write a {requests[i % 2]} review of a film about the sea {i // 2}.",
        }
        for i in range(num_prompts)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    said = [
        {"prompt": row["prompt"], "chosen": f"I loved it {i}.", "rejected": "Awful."}
        if i % 2
        else {"prompt": row["prompt"], "completions": [f"I loved it {i}.", ["Dull.", "Nothing new."], "Awful."]}
        for i, row in enumerate(rows)
    ]
    (folder / "people.jsonl").write_text("\n".join(json.dumps(row) for row in said), encoding="utf-8")


def base(folder: Path, model: Path, stages: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A recipe in fp32 on one machine; ``stages`` are the test's own."""
    engine = {"dtype": "float32", "max_model_len": 160, "kv_cache_gib": 0.1, "max_num_seqs": 32}
    judge = dict(engine, max_model_len=384)
    constitution = write_constitution(folder)
    return {
        "name": "tiny",
        "seed": 5,
        "run_dir": str(folder / "run"),
        "model": str(model),
        "max_sequence_tokens": 160,
        "sampling": {"max_tokens": 12},
        "data": {name: {"path": "prompts.jsonl"} for name in ("train", "validation", "evaluation")},
        "constitutions": {"training": constitution.name, "evaluation": constitution.name},
        "roles": {
            "generation": {"resources": {"cpus": 0.1}, "engine": engine, "bucket_mib": 0.1},
            "judge": {"resources": {"cpus": 0.1}, "engine": judge},
            "scorer": {"resources": {"cpus": 0.1}},
            "reference": {"resources": {"cpus": 0.1}},
            "learner": {"resources": {"cpus": 0.1}},
            "critic": {"resources": {"cpus": 0.1}},
        },
        "ray": {"num_cpus": 4, "object_store_gib": 0.2},
        "stages": stages,
    }


def learner(**optim: float) -> dict[str, Any]:
    """A learner's settings in fp32."""
    return {"model": {"dtype": "float32"}, "optim": {"lr": 1e-3, **optim}}


def write_recipe(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """Writes the recipe beside its data."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    return path


def start(recipe: Path, *arguments: str, module: str = "cluster.cli", log: Path | None = None) -> subprocess.Popen[str]:
    """Starts ``rlhf run``; ``module`` is what has the command line.

    Output goes to ``log``, which is ``driver.log`` beside the recipe where none is given.
    """
    _BEFORE.setdefault(recipe, set(runtime_processes()))
    command = [sys.executable, "-m", module, "run", str(recipe), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in MARKS}
    with (log or recipe.parent / "driver.log").open("a", encoding="utf-8") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True)


@contextlib.contextmanager
def running(recipe: Path, *arguments: str, module: str = "cluster.cli") -> Iterator[subprocess.Popen[str]]:
    """A driver for the length of a block: a test that fails inside it does not leave the driver behind."""
    driver = start(recipe, *arguments, module=module)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait(60)


_BEFORE: dict[Path, set[int]] = {}
"""Ray's and the engines' processes that were there before a recipe's first run, such as the session's own cluster."""


def runtime_processes() -> dict[int, str]:
    """Ray's and the engines' processes by id: they rename themselves, which hides their environment, but not this.

    What lives below a process of somebody else's is left out: another run may go on on the same machine.
    """
    found = {}
    here = [os.getpid(), *(parent.pid for parent in psutil.Process().parents())]
    for process in psutil.process_iter():
        try:
            title = _title(process)
            if _is_runtime(title) and process.status() != psutil.STATUS_ZOMBIE and _may_be_ours(process, here):
                found[process.pid] = title
        except psutil.Error:
            continue
    return found


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def _is_runtime(title: str) -> bool:
    return any(part in title for part in RUNTIME)


def _may_be_ours(process: psutil.Process, here: list[int]) -> bool:
    """Whether a process descends from this one, or from none that lives and none of another test session.

    Orphans go to an ancestor of this process, such as the system's first one. A session that goes on beside this one
    may have some too: Ray's own processes, which keep their environment, say whose they are.

    Args:
        process: One of Ray's or an engine's.
        here: Ids of this process and its ancestors.
    """
    above = process.parents()
    if here[0] in [parent.pid for parent in above]:
        return True
    sessions = {_session(each) for each in (process, *above)} - {None}
    if sessions and os.environ[SESSION_MARK] not in sessions:
        return False
    return all(parent.pid in here or _is_runtime(_title(parent)) for parent in above)


def _session(process: psutil.Process) -> str | None:
    """The test session that a process was started by, where it says so."""
    try:
        return process.environ().get(SESSION_MARK)
    except psutil.Error:
        return None


def run(recipe: Path, *arguments: str, timeout_s: float = 1200.0, log: Path | None = None) -> int:
    """Runs the command to its end and returns its exit code; nothing it started may be left."""
    driver = start(recipe, *arguments, log=log)
    try:
        return driver.wait(timeout_s)
    finally:
        driver.kill()
        assert_gone(recipe)


def log_of(recipe: Path) -> str:
    """What the drivers of a recipe have printed so far."""
    return (recipe.parent / "driver.log").read_text(encoding="utf-8")


def wait_for(
    driver: subprocess.Popen[str], ready: Callable[[], bool], timeout_s: float = 900.0, *, poll_s: float = 0.05
) -> None:
    """Returns once ``ready()`` holds, looking every ``poll_s`` seconds; the driver has to live until then."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert driver.poll() is None, f"the driver ended with {driver.returncode} before it could be stopped"
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(poll_s)


def wait_for_cluster(driver: subprocess.Popen[str], run_dir: Path) -> None:
    """Returns once the driver's Ray is up, which Ray wants within a time of its own: no two are started at once."""
    wait_for(driver, lambda: has_event(run_dir, "stage_started"))


def kill_when(
    driver: subprocess.Popen[str], ready: Callable[[], bool], *, sign: signal.Signals, poll_s: float = 0.05
) -> int:
    """Sends the driver a signal once ``ready()`` holds, and returns its exit code."""
    wait_for(driver, ready, poll_s=poll_s)
    os.kill(driver.pid, sign)
    return driver.wait(300)


def workers(recipe: Path, name: str) -> list[int]:
    """Process ids of a recipe's runs whose title begins with ``name``, for example ``ray::LearnerWorker``."""
    return [pid for pid, title in runtime_processes().items() if title.startswith(name) and pid not in _BEFORE[recipe]]


def titles_below(pid: int) -> list[str]:
    """Titles of all processes that descend from one."""
    titles = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
    return titles


def engine_seconds(recipe: Path) -> float:
    """CPU time that the engines of a recipe's runs have used; it grows while they draw, and hardly while they wait."""
    seconds = 0.0
    for pid in workers(recipe, "VLLM::"):
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            seconds += times.user + times.system
    return seconds


def kill_worker(recipe: Path, name: str) -> None:
    """Sends SIGKILL to the workers of a recipe's run whose title begins with ``name``."""
    found = workers(recipe, name)
    assert found, f"no process {name}"
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def metrics(run_dir: Path, stage: str = "rl") -> list[dict[str, Any]]:
    """Every number of a stage's steps but timings."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [
        {"step": line["step"]} | {k: v for k, v in line["metrics"].items() if not k.endswith(TIMINGS)}
        for line in lines
        if line["stage"] == stage
    ]


def table(run_dir: Path, kind: str, name: str = "[!.]*") -> list[dict[str, Any]]:
    """Every row of a kind of table (``rollouts``, ``verdicts``, ``rankings``, ``eval``), in the files' order.

    ``name`` is a pattern of files, such as ``rl.step_*`` for the rollouts that were learned from; without one, what a
    killed writer left is left out.
    """
    return [row for file in sorted((run_dir / kind).glob(f"{name}.parquet")) for row in read_table(file)]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind, in order."""
    return [event for event in read_events(run_dir / "events.jsonl") if event["kind"] == kind]


def has_event(run_dir: Path, kind: str) -> bool:
    """Whether an event of the kind has been written so far; the file may not be there yet."""
    return (run_dir / "events.jsonl").is_file() and bool(events(run_dir, kind))


def assert_gone(recipe: Path, timeout_s: float = 300.0) -> None:
    """No process of a recipe's runs is left, engines' children and Ray's own included.

    After a SIGKILL of the driver the watchdog ends what does not end by itself.
    """
    deadline = time.monotonic() + timeout_s
    while left := {pid: title for pid, title in runtime_processes().items() if pid not in _BEFORE[recipe]}:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)
