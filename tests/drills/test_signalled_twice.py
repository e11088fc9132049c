"""Two signals while engines draw, while a judge is asked, and in an evaluation; updates: tests/e2e."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.actors.judge_service import Reply, Service, completion
from tests.drills.times import event_after
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ENDLESS = 2000
"""Siblings of a prompt that take longer to draw than any test."""


class SilentService(Service):
    """Answers nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = threading.Event()
        self.behave = self._when_told

    def _when_told(self, body: dict[str, Any], tries: int) -> Reply:
        self.may_answer.wait(900.0)
        return 200, completion(-0.5, -1.5)


@pytest.fixture
def services() -> Iterator[dict[str, SilentService]]:
    """One for each stage that asks a judge."""
    found = {kind: SilentService() for kind in ("feedback", "evaluate")}
    yield found
    for service in found.values():
        service.may_answer.set()
        service.close()


@dataclass
class Phase:
    """One run, and when it is in the middle of what it is signalled in.

    Attributes:
        what: It, in words.
        stage: The only stage of the run.
        is_on: Whether it is, given the driver.
    """

    what: str
    stage: dict[str, Any]
    is_on: Callable[[subprocess.Popen[str]], bool]


@pytest.mark.timeout(1800)
def test_a_second_signal_ends_every_phase_at_once(
    tmp_path: Path, tiny_model_dir: Path, services: dict[str, SilentService], tell: Callable[..., None]
) -> None:
    """SIGTERM twice while the engine draws in rl, while a judge that says nothing is asked in feedback, and in an
    evaluation that waits for such a judge; then the evaluation's command once more, with a judge that answers.

    Passes if each driver ends with 143 and one line that says so, no step and no stage counted as done, and no process
    is left; and the same command then completes the evaluation with every margin.
    """
    wanted = phases(services)
    found = {kind: write_recipe(tmp_path / kind, tiny_model_dir, phase, services) for kind, phase in wanted.items()}
    ended: dict[str, float] = {}
    with contextlib.ExitStack() as stack:  # side by side: what takes time is how they start
        drivers = {}
        for kind, recipe in found.items():
            drivers[kind] = stack.enter_context(recipes.running(recipe))
            recipes.wait_for_cluster(drivers[kind], recipe.parent / "run")
        for kind, phase in wanted.items():
            ended[kind] = signal_twice(drivers[kind], phase, found[kind].parent / "run")
            assert drivers[kind].returncode == 128 + signal.SIGTERM, recipes.log_of(found[kind])
    recipes.assert_gone(found["rl"])  # the first to start: nothing was there before it
    for kind, phase in wanted.items():
        assert_stopped(found[kind], kind)
        tell(f"SIGTERM twice while {phase.what}", detect_s=ended[kind])

    services["evaluate"].may_answer.set()
    began = time.time()
    assert recipes.run(found["evaluate"]) == 0, recipes.log_of(found["evaluate"])
    run = found["evaluate"].parent / "run"
    done = event_after(run, "stage_completed", began) - began
    tell("the run that was signalled twice in its evaluation goes on", recover_s=done, lost_steps=0)
    rows = recipes.table(run, "eval")
    assert rows and all(row[f"{arm}_judge_margin"] is not None for row in rows for arm in ("before", "after"))


def phases(services: dict[str, SilentService]) -> dict[str, Phase]:
    """By the stage that they are in."""
    rl = {
        "kind": "rl",
        "select_best": False,
        "learner": recipes.learner(),
        "algorithm": {"name": "grpo"},
        "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
        "loop": {"steps": 2, "prompts_per_step": 4, "num_samples": ENDLESS},
    }
    feedback = {"kind": "feedback", "loop": {"num_samples": 2, "prompts_per_chunk": 4}}
    evaluate = {"kind": "evaluate", "num_samples": 1, "best_of": 0}
    return {
        "rl": Phase("the engine draws", rl, draws),
        "feedback": Phase("the judge is asked", feedback, lambda driver: bool(services["feedback"].bodies)),
        "evaluate": Phase("an evaluation asks the judge", evaluate, lambda driver: bool(services["evaluate"].bodies)),
    }


def draws(driver: subprocess.Popen[str]) -> bool:
    """Whether the engine below a driver works: it can have its prompts, as the rules are there, and computes."""
    titles: dict[int, str] = {}
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles[process.pid] = " ".join(process.cmdline())
    engines = [pid for pid, title in titles.items() if title.startswith("VLLM::")]
    if not engines or not any(title.startswith("ray::RulesWorker") for title in titles.values()):
        return False
    before = seconds_of(engines)
    time.sleep(2.0)
    return seconds_of(engines) > before + 0.5


def seconds_of(pids: list[int]) -> float:
    """CPU time of some processes so far."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def write_recipe(folder: Path, model: Path, phase: Phase, services: dict[str, SilentService]) -> Path:
    folder.mkdir()
    recipes.write_data(folder)
    recipe = recipes.base(folder, model, [phase.stage])
    recipe["sampling"] = {"max_tokens": 64 if phase.stage["kind"] == "rl" else 12, "ignore_eos": True}
    if (service := services.get(phase.stage["kind"])) is not None:
        endpoint = {"base_url": service.url, "model": "m", "api_key_variable": None, "timeout_s": 600.0}
        recipe["roles"]["judge"]["endpoint"] = endpoint
    return recipes.write_recipe(folder, recipe)


def signal_twice(driver: subprocess.Popen[str], phase: Phase, run: Path) -> float:
    """Sends the second signal once the first one was taken note of; returns the seconds from it to the driver's end."""
    recipes.wait_for(driver, lambda: phase.is_on(driver), 600.0)
    os.kill(driver.pid, signal.SIGTERM)
    recipes.wait_for(driver, (run / "control" / "stop").exists, poll_s=0.01)
    os.kill(driver.pid, signal.SIGTERM)
    sent = time.monotonic()
    driver.wait(300)
    return time.monotonic() - sent


def assert_stopped(recipe: Path, kind: str) -> None:
    """The run is stopped and nothing more: nothing of its one stage is done."""
    run, log = recipe.parent / "run", recipes.log_of(recipe)
    assert recipes.metrics(run, kind) == []
    assert not (run / "stages" / f"{kind}.json").exists()
    [stopped] = recipes.events(run, "stopped")
    assert stopped["signal"] == "SIGTERM"
    assert "stopped by SIGTERM" in log and "Traceback" not in log
