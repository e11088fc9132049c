"""``rlhf status``: what a reader sees, for programs and on a terminal, and the exit code."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import status as module
from cluster.cli import main
from cluster.status import show_status
from cluster.status_view import render
from rlhf.config import StrictModel
from rlhf.runs.directory import RunDirectory
from rlhf.runs.status import (
    Health,
    MemoryStatus,
    Reading,
    RoleStatus,
    RunStatus,
    StageStatus,
    StepStatus,
    status_path,
    write_status,
)
from rlhf.runs.summary import Summary, write_summary

ROOT = Path("runs/x")


class Recipe(StrictModel):
    stages: list[dict[str, str]] = [{"name": "feedback"}, {"name": "rl"}]


def status(**changes: Any) -> RunStatus:
    now = time.time()
    known: dict[str, Any] = {
        "run": "x",
        "time": now,
        "started": now - 3725,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "stages": {"feedback": True, "rl": False},
        "stage": StageStatus(name="rl", seconds=125.0, done=7, total=40, seconds_left=600.0),
        "roles": [
            RoleStatus(
                role="generation",
                wanted=3,
                replicas={"healthy": 2, "starting": 1},
                version=9,
                items=24,
                calls=2,
                tokens_per_second=512.4,
                restarts=1,
            ),
            RoleStatus(role="learner", kind="gang", wanted=2, replicas={"healthy": 2}),
        ],
        "step": StepStatus(
            stage="rl",
            step=7,
            seconds=12.34,
            metrics={"rollout/score": 0.3123, "rollout/staleness": 1.0, "learner/loss": None},
        ),
        "validation": StepStatus(stage="rl", step=5, metrics={"validation/score": 0.25}),
        "events": [{"time": now, "kind": "replica_lost", "role": "generation", "replica": 1, "error": "gone\n\x1b[2J"}],
        "memory": MemoryStatus(driver_machine=4 * 2**30, driver_machine_peak=5 * 2**30, object_store=2**20),
        "metrics_endpoints": ["10.0.0.1:9100", "10.0.0.2:9100"],
    }
    return RunStatus(**(known | changes))


def shown(reading: Reading, width: int = 110) -> str:
    console = Console(record=True, width=width, file=open(os.devnull, "w", encoding="utf-8"), highlight=False)  # noqa: SIM115
    console.print(render(ROOT, reading))
    return console.export_text()


def test_a_running_run_shows_stage_roles_scores_and_faults() -> None:
    text = shown(Reading(Health.RUNNING, status(), 1.0, held=True))
    lines = text.splitlines()
    assert lines[0].startswith("runs/x  running  for 1:02:05 on ")
    assert "feedback done" in text and "7/40" in text and "2:05 passed" in text and "about 10:00 left" in text
    [generation] = [line.split() for line in lines if line.startswith("generation")]
    assert generation == ["generation", "2", "healthy,", "1", "starting", "(of", "3)", "9", "24", "2", "512", "1"]
    [learner] = [line.split() for line in lines if line.startswith("learner")]
    assert learner[:3] == ["learner", "2", "ranks"]
    assert "rl 7: score 0.312, staleness 1, took 12.3 s, learner/loss not finite" in text
    assert "rl after 5: score 0.25" in text
    assert "4.0 GiB on the driver's machine, 5.0 GiB at most" in text
    assert "http://10.0.0.1:9100/metrics and 1 more" in text
    [event] = [line for line in lines if "replica_lost" in line]
    assert "generation[1]" in event and "error=gone" in event
    assert "\x1b" not in text, "what a worker said is shown and not obeyed"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_any_terminal(width: int) -> None:
    text = shown(Reading(Health.RUNNING, status(), 1.0, held=True), width)
    assert max(map(len, text.splitlines())) <= width


def test_a_silent_driver_and_a_lost_one_are_told_plainly() -> None:
    silent = shown(Reading(Health.SILENT, status(), 95.0, held=True))
    assert "has written nothing for 1:35" in silent and "generation" in silent
    lost = shown(Reading(Health.LOST, status(), 95.0, held=False), 200)
    assert "killed or crashed" in lost and "Run the same command again" in lost
    assert "tokens/s" not in lost and " left" not in lost, "roles and forecasts went with the driver"
    assert "7/40" in lost


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        (Health.STARTING, "starts the cluster"),
        (Health.NEW, "no driver is at work"),
    ],
)
def test_a_run_without_a_status_says_why(health: Health, expected: str) -> None:
    assert expected in shown(Reading(health, None, 0.0, held=False))


def test_other_ends_have_words_of_their_own() -> None:
    assert "ended 0:03 ago" in shown(Reading(Health.ENDED, status(ended=True, stage=None), 3.0, held=False))
    assert "is closing" in shown(Reading(Health.RUNNING, status(ended=True), 3.0, held=True))
    unseen = shown(Reading(Health.RUNNING, status(), 3.0, held=False), 200)
    assert "its lock is not seen from this machine" in unseen


def test_what_is_not_known_yet_is_left_out() -> None:
    bare = RunStatus(run="x", time=1.0, started=1.0, host="h", pid=1, stages={"rl": False})
    text = shown(Reading(Health.RUNNING, bare, 0.0, held=True))
    assert "rl" in text and "last step" not in text and "metrics" not in text
    begun = bare.model_copy(update={"stage": StageStatus(name="rl", seconds=3.0)})
    assert "0:03 passed" in shown(Reading(Health.RUNNING, begun, 0.0, held=True))


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    with RunDirectory.open(root, Recipe()):
        write_status(root, status())
        assert main(["status", str(root)]) == 0, "no terminal: printed once"
        assert "7/40" in capsys.readouterr().out
        assert main(["status", str(root), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["health"], document["held"], document["problem"]) == ("running", True, "")
        assert document["status"]["roles"][0]["items"] == 24
    assert main(["status", str(root), "--once"]) == 1, "the lock is gone and the file says that it runs"
    assert "lost" in capsys.readouterr().out
    status_path(root).write_text("{", encoding="utf-8")
    assert main(["status", str(root), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["status"] is None and "status.json:1" in document["problem"]
    assert main(["status", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err


def test_a_complete_run_prints_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    with RunDirectory.open(root, Recipe()) as run:
        for name in ("feedback", "rl"):
            run.complete(name, {})
    assert main(["status", str(root)]) == 0
    assert "still to be written" in capsys.readouterr().out
    known: dict[str, Any] = {
        "timings": {"rl": {"total": 120.0}},
        "throughput": {},
        "versions": {},
        "passed": {"a": True},
    }
    write_summary(run.summary, Summary(recipe="x", seed=1, peak_memory_gib=3.5, **known))
    assert main(["status", str(root)]) == 0
    told = capsys.readouterr().out
    assert "time 2.0 min, peak memory 3.5 GiB" in told and "met" in told
    run.summary.write_text("{", encoding="utf-8")
    assert main(["status", str(root)]) == 0
    assert "summary.json:1" in "".join(capsys.readouterr().out.split())  # however it is folded


def test_a_live_view_follows_the_run_until_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    steps = iter([None, 8, None])
    with RunDirectory.open(root, Recipe()) as run:
        write_status(root, status())

        def later(seconds: float) -> None:
            if (done := next(steps)) is not None:
                write_status(root, status(stage=StageStatus(name="rl", done=done, total=40)))
            elif done is None and not run.is_complete("rl"):
                return
            else:
                raise AssertionError("a complete run is not followed")

        looks = 0

        def look(path: Path) -> Reading:
            nonlocal looks
            looks += 1
            if looks == 4:
                for name in ("feedback", "rl"):
                    run.complete(name, {})
                run.close()
            from rlhf.runs.status import read_status

            return read_status(path)

        monkeypatch.setattr(module.time, "sleep", later)
        monkeypatch.setattr(module, "read_status", look)
        monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
        assert show_status(root) == 0
    assert "every stage is complete" in capsys.readouterr().out


def test_ctrl_c_leaves_a_live_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    with RunDirectory.open(root, Recipe()):
        write_status(root, status())

        def interrupted(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(module.time, "sleep", interrupted)
        monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
        assert show_status(root) == 0
