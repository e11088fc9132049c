"""Each stage of feedback -> reward -> sft -> rl -> evaluate is stopped by SIGTERM once and killed by SIGKILL once.

Two runs of one recipe go on side by side. The drivers of the one are stopped early in every stage, those of the other
are killed late: up to there the second one does what an undisturbed run does, and from there on the first one does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import psutil
import pytest

from tests.actors.judge_service import Reply, Service, completion
from tests.drills.times import step_after
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STAGES = ("feedback", "reward", "sft", "rl", "evaluate")
RL_STEPS, PROMPTS, SAMPLES = 20, 4, 3
SAVE_EVERY = {"reward": 10, "sft": 10, "rl": 4}
_RAY_STARTS = Lock()
"""Ray has to start within a time of its own, so one cluster starts after the other."""

Ready = Callable[[subprocess.Popen[str]], bool]
"""Whether a driver has come to where it is to be disturbed."""


@pytest.fixture
def service() -> Iterator[Service]:
    """A judge that says of every text what the text's digest says: the same in every run."""
    service = Service()
    service.behave = _verdict
    yield service
    service.close()


def _verdict(body: dict[str, Any], tries: int) -> Reply:
    digest = hashlib.blake2b(body["prompt"].encode(), digest_size=2).digest()
    return 200, completion(-0.1 - digest[0] / 100, -0.1 - digest[1] / 100)


@dataclass(frozen=True)
class Disturbance:
    """One driver's life; times in seconds, ``began`` since the epoch."""

    stage: str
    began: float
    ended_in_s: float
    num_logged: int


@dataclass
class Disturbed:
    """One run of the recipe whose drivers end by one signal, and how they ended so far."""

    recipe: Path
    sign: signal.Signals
    past: list[Disturbance] = field(default_factory=list)
    last_began: float = 0.0

    @property
    def run(self) -> Path:
        return self.recipe.parent / "run"

    def disturb(self, stage: str, ready: Ready, *, poll_s: float = 0.02) -> None:
        """Runs the command until ``ready()`` in ``stage``, sends the signal, and checks how the driver ends."""

        def in_stage() -> bool:
            started = recipes.events(self.run, "stage_started")
            return bool(started) and started[-1]["stage"] == stage and ready(driver)

        began = time.time()
        with self._running() as driver:
            while True:
                recipes.wait_for(driver, in_stage, poll_s=poll_s)
                os.kill(driver.pid, signal.SIGSTOP)  # what was seen holds on, or the next time is waited for
                recipes.wait_for(driver, lambda: psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED)
                if in_stage():
                    break
                os.kill(driver.pid, signal.SIGCONT)
            below = psutil.Process(driver.pid).children(recursive=True)
            os.kill(driver.pid, self.sign)
            os.kill(driver.pid, signal.SIGCONT)
            sent = time.time()
            code = driver.wait(300)
        left = psutil.wait_procs(below, timeout=120)[1]
        assert not left, f"left behind: {left}"
        self.past.append(Disturbance(stage, began, time.time() - sent, len(recipes.metrics(self.run, stage))))
        expected = -self.sign if self.sign == signal.SIGKILL else 128 + self.sign
        assert code == expected, recipes.log_of(self.recipe)
        done = {file.stem for file in (self.run / "stages").glob("*.json")}
        assert done == set(STAGES[: STAGES.index(stage)]), f"the signal did not come inside {stage}"

    def finish(self) -> None:
        """Runs the command to its end."""
        self.last_began = time.time()
        with self._running() as driver:
            assert driver.wait(900) == 0, recipes.log_of(self.recipe)

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[str]]:
        """The next driver, once its Ray has started."""
        num_started = len(recipes.events(self.run, "stage_started"))
        with contextlib.ExitStack() as stack:
            with _RAY_STARTS:
                driver = stack.enter_context(recipes.running(self.recipe))
                recipes.wait_for(driver, lambda: len(recipes.events(self.run, "stage_started")) > num_started)
            yield driver

    def tell(self, tell: Callable[..., None]) -> None:
        """One line for each driver but the last; the one after it says how it went on."""
        for past, then in zip(self.past, [*self.past[1:], None], strict=True):
            began = self.last_began if then is None else then.began
            figures: dict[str, float] = {"detect_s": past.ended_in_s}
            if past.stage in SAVE_EVERY:
                [step] = [e["step"] for e in recipes.events(self.run, "stage_resumed") if e["stage"] == past.stage]
                figures |= {"recover_s": step_after(self.run, past.stage, began) - began}
                figures |= {"lost_steps": past.num_logged - step}
            tell(f"{self.sign.name} in {past.stage}", **figures)

    def chunks(self, count: int) -> Ready:
        """So many chunks of the feedback stage are on disk."""
        return lambda driver: len(list((self.run / "groups").glob("[!.]*.parquet"))) >= count

    def steps(self, stage: str, count: int) -> Ready:
        """So many steps of a stage are logged."""
        return lambda driver: len(recipes.metrics(self.run, stage)) >= count

    def is_saving(self, stage: str, first_step: int) -> Ready:
        """A checkpoint of step ``first_step`` or later is being written."""
        folder = self.run / "checkpoints" / stage

        def unfinished(driver: subprocess.Popen[str]) -> bool:
            found = [re.match(r"^\.tmp-step_(\d+)-", path.name) for path in folder.glob(".tmp-step_*")]
            return any(match and int(match[1]) >= first_step for match in found)

        return unfinished


def _has_worker(name: str) -> Ready:
    """A worker of that name has started."""
    return lambda driver: any(title.startswith(f"ray::{name}") for title in recipes.titles_below(driver.pid))


@pytest.mark.timeout(2700)
def test_signals_in_every_stage_change_nothing(
    tmp_path: Path, tiny_model_dir: Path, service: Service, tell: Callable[..., None]
) -> None:
    """Ten drivers end by a signal, two in each stage, one of them inside a checkpoint's save; two more finish.

    Passes if a SIGTERM ends a driver with 143 and what it saved, no process is left after any, the same command goes on
    each time from the last good checkpoint and says from which, also where a byte of the newest has flipped, the last
    drivers end with 0, no verdict or rollout is lost or there twice, and every table, metric and result is equal to
    that of a run that was not disturbed there, bit for bit.
    """
    stopped = Disturbed(_write_recipe(tmp_path / "stopped", tiny_model_dir, service), signal.SIGTERM)
    killed = Disturbed(_write_recipe(tmp_path / "killed", tiny_model_dir, service), signal.SIGKILL)
    with ThreadPoolExecutor(2) as pool:
        lives = [pool.submit(_stop, stopped), pool.submit(_kill, killed)]
    damaged = lives[0].result()
    lives[1].result()
    recipes.assert_gone(stopped.recipe)

    for drill in (stopped, killed):
        drill.tell(tell)
        _check_complete(drill.run)
    _check_stopped(stopped.run, damaged)
    _check_killed(killed.run)
    for early, late in zip(stopped.past, killed.past, strict=True):
        assert early.num_logged < late.num_logged or early.stage not in SAVE_EVERY
    _check_equal(stopped.run, killed.run)


def _stop(drill: Disturbed) -> int:
    """SIGTERM early in each stage; returns the step of the checkpoint that was damaged in between."""
    drill.disturb("feedback", drill.chunks(1))
    drill.disturb("reward", drill.steps("reward", 15))
    drill.disturb("sft", drill.steps("sft", 15))
    drill.disturb("rl", drill.steps("rl", 6))
    damaged = _flip_a_byte_of_the_newest(drill.run / "checkpoints" / "rl")
    drill.disturb("evaluate", _has_worker("GenerationWorker"), poll_s=0.2)
    drill.finish()
    return damaged


def _kill(drill: Disturbed) -> None:
    """SIGKILL late in each stage."""
    drill.disturb("feedback", drill.chunks(4))
    drill.disturb("reward", drill.steps("reward", 40))
    drill.disturb("sft", drill.steps("sft", 40))
    drill.disturb("rl", drill.is_saving("rl", 12), poll_s=0.005)
    drill.disturb("evaluate", _has_worker("ReferenceWorker"), poll_s=0.2)
    drill.finish()


def _write_recipe(folder: Path, model: Path, service: Service) -> Path:
    """The recipe of both runs; one thread a role, so that each run has a core of its own where there are two."""
    folder.mkdir()
    recipes.write_data(folder)
    recipe = recipes.base(folder, model, _stages())
    recipe["checkpoints"] = {"in_background": True}
    recipe["roles"]["judge"]["endpoint"] = {"base_url": service.url, "model": "m", "api_key_variable": None}
    for role in recipe["roles"].values():
        role["resources"]["threads"] = 1
    return recipes.write_recipe(folder, recipe)


def _stages() -> list[dict[str, Any]]:
    offline = {"learner": recipes.learner()}
    return [
        {"kind": "feedback", "loop": {"num_samples": SAMPLES, "prompts_per_chunk": 2}},
        {
            "kind": "reward",
            **offline,
            "held_out_fraction": 0.3,
            "loop": {"epochs": 30, "groups_per_step": 4, "checkpoint_every": SAVE_EVERY["reward"]},
        },
        {
            "kind": "sft",
            **offline,
            "source": "feedback",
            "min_score": -100.0,
            "loop": {"epochs": 25, "groups_per_step": 4, "checkpoint_every": SAVE_EVERY["sft"]},
        },
        {
            "kind": "rl",
            "select_best": False,
            "learner": recipes.learner(),
            "algorithm": {"name": "grpo"},
            "rewards": [{"source": "reward_model", "normalise": True}],
            "loop": {
                "steps": RL_STEPS,
                "prompts_per_step": PROMPTS,
                "num_samples": SAMPLES,
                "checkpoint_every": SAVE_EVERY["rl"],
            },
        },
        {"kind": "evaluate", "num_samples": 1, "best_of": 0},
    ]


def _flip_a_byte_of_the_newest(folder: Path) -> int:
    """Damages the weights of the newest checkpoint and returns its step."""
    newest = max(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    weights = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    return int(newest.name.removeprefix("step_"))


def _check_stopped(run: Path, damaged: int) -> None:
    """The events tell every resume of the run that was stopped, and the damaged checkpoint."""
    resumed = {event["stage"]: event["step"] for event in recipes.events(run, "stage_resumed")}
    assert resumed["reward"] >= 15 and resumed["sft"] >= 15, "saved when told to"
    every = SAVE_EVERY["rl"]
    assert resumed["rl"] == (damaged - 1) // every * every, "the newest checkpoint before the damaged one"
    [rejected] = [event for event in recipes.events(run, "checkpoint_rejected") if event["stage"] == "rl"]
    assert rejected["path"].endswith(f"bad-step_{damaged}") and "altered bytes" in rejected["found"]
    assert len(recipes.events(run, "stopped")) == len(STAGES)


def _check_killed(run: Path) -> None:
    """The events tell every resume of the run that was killed, and the unfinished checkpoint."""
    resumed = {event["stage"]: event["step"] for event in recipes.events(run, "stage_resumed")}
    for stage in ("reward", "sft"):
        assert resumed[stage] >= 30 and resumed[stage] % SAVE_EVERY[stage] == 0, "saved every ten steps"
    every = SAVE_EVERY["rl"]
    assert resumed["rl"] >= 12 - every and resumed["rl"] % every == 0
    [unfinished] = [event for event in recipes.events(run, "checkpoint_unfinished") if event["stage"] == "rl"]
    assert f".tmp-step_{resumed['rl'] + every}-" in unfinished["path"]
    assert recipes.events(run, "stopped") == []


def _check_complete(run: Path) -> None:
    """Every stage, every verdict and every rollout once."""
    assert [event["stage"] for event in recipes.events(run, "stage_completed")] == list(STAGES)
    uids = [f"p/{i}" for i in range(16)]
    verdicts = Counter((row["uid"], *row["samples"]) for row in recipes.table(run, "verdicts", "feedback.*"))
    assert verdicts.keys() == {(uid, k) for uid in {key[0] for key in verdicts} for k in range(SAMPLES)}
    assert set(verdicts.values()) == {1} and len(verdicts) == len(uids) * SAMPLES
    assert len(recipes.table(run, "rankings")) == len(uids)
    rollouts = recipes.table(run, "rollouts")
    drawn = Counter((row["step"] is None, row["uid"], row["sample"]) for row in rollouts)
    assert set(drawn.values()) == {1}
    assert len(rollouts) == len(uids) * SAMPLES + RL_STEPS * PROMPTS * SAMPLES


def _check_equal(run: Path, other: Path) -> None:
    """One run against the other, number by number."""
    for stage in ("reward", "sft", "rl"):
        assert recipes.metrics(run, stage) == recipes.metrics(other, stage), stage
    for kind in ("verdicts", "rankings", "rollouts", "eval"):
        assert recipes.table(run, kind) == recipes.table(other, kind), kind
    for folder in ("reward_model", "policy"):
        files = list((other / folder).glob("*.safetensors"))
        assert files, folder
        for file in files:
            assert (run / folder / file.name).read_bytes() == file.read_bytes(), folder
    for stage in STAGES:
        results = [json.loads((root / "stages" / f"{stage}.json").read_text())["results"] for root in (run, other)]
        assert results[0] == results[1], stage
