"""Each stage of feedback -> reward -> sft -> rl -> evaluate is stopped by SIGTERM once and killed by SIGKILL once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
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
    sign: signal.Signals
    began: float
    ended_in_s: float
    num_logged: int


@dataclass
class Disturbed:
    """One recipe, its run directory, and how its drivers ended so far."""

    recipe: Path
    run: Path
    past: list[Disturbance] = field(default_factory=list)
    last_began: float = 0.0

    def disturb(self, stage: str, sign: signal.Signals, ready: Callable[[], bool], *, poll_s: float = 0.02) -> None:
        """Runs the command until ``ready()`` in ``stage``, sends the signal, and checks how the driver ends."""

        def in_stage() -> bool:
            started = recipes.events(self.run, "stage_started")
            return bool(started) and started[-1]["stage"] == stage and ready()

        began = time.time()
        with recipes.running(self.recipe) as driver:
            while True:
                recipes.wait_for(driver, in_stage, poll_s=poll_s)
                os.kill(driver.pid, signal.SIGSTOP)  # what was seen holds on, or the next time is waited for
                recipes.wait_for(driver, lambda: psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED)
                if in_stage():
                    break
                os.kill(driver.pid, signal.SIGCONT)
            os.kill(driver.pid, sign)
            os.kill(driver.pid, signal.SIGCONT)
            sent = time.time()
            code = driver.wait(300)
        recipes.assert_gone(self.recipe)
        self.past.append(Disturbance(stage, sign, began, time.time() - sent, len(recipes.metrics(self.run, stage))))
        expected = -sign if sign == signal.SIGKILL else 128 + sign
        assert code == expected, recipes.log_of(self.recipe)
        done = {file.stem for file in (self.run / "stages").glob("*.json")}
        assert done == set(STAGES[: STAGES.index(stage)]), f"the signal did not come inside {stage}"

    def tell(self, tell: Callable[..., None]) -> None:
        """One line for each driver but the last; the one after it says how it went on."""
        for past, then in zip(self.past, [*self.past[1:], None], strict=True):
            began = self.last_began if then is None else then.began
            figures: dict[str, float] = {"detect_s": past.ended_in_s}
            if past.stage in SAVE_EVERY:
                resumed = [e for e in recipes.events(self.run, "stage_resumed") if e["stage"] == past.stage]
                [step] = [event["step"] for event in resumed if event["time"] > began][:1]
                figures |= {"recover_s": step_after(self.run, past.stage, began) - began}
                figures |= {"lost_steps": past.num_logged - step}
            tell(f"{past.sign.name} in {past.stage}", **figures)

    def chunks(self, count: int) -> Callable[[], bool]:
        """So many chunks of the feedback stage are on disk."""
        return lambda: len(list((self.run / "groups").glob("[!.]*.parquet"))) >= count

    def steps(self, stage: str, count: int) -> Callable[[], bool]:
        """So many steps of a stage are logged."""
        return lambda: len(recipes.metrics(self.run, stage)) >= count

    def is_saving(self, stage: str, first_step: int) -> Callable[[], bool]:
        """A checkpoint of step ``first_step`` or later is being written."""
        folder = self.run / "checkpoints" / stage

        def unfinished() -> bool:
            found = [re.match(r"^\.tmp-step_(\d+)-", path.name) for path in folder.glob(".tmp-step_*")]
            return any(match and int(match[1]) >= first_step for match in found)

        return unfinished

    def has_worker(self, name: str) -> Callable[[], bool]:
        """A worker of that name has started."""
        return lambda: bool(recipes.workers(self.recipe, name))


@pytest.mark.timeout(3600)
def test_signals_in_every_stage_change_nothing(
    tmp_path: Path, tiny_model_dir: Path, service: Service, tell: Callable[..., None]
) -> None:
    """Ten drivers end by a signal, two in each stage, one of them inside a checkpoint's save; the eleventh finishes.

    Passes if a SIGTERM ends a driver with 143 and what it saved, no process is left after any, the same command goes on
    each time from the last good checkpoint and says from which, also where a byte of the newest has flipped, the last
    driver ends with 0, no verdict or rollout is lost or there twice, and every table, metric and result is equal to an
    undisturbed run's, bit for bit.
    """
    recipes.write_data(tmp_path)
    recipe = recipes.base(tmp_path, tiny_model_dir, _stages())
    recipe["checkpoints"] = {"in_background": True}
    recipe["roles"]["judge"]["endpoint"] = {"base_url": service.url, "model": "m", "api_key_variable": None}
    drill = Disturbed(recipes.write_recipe(tmp_path, recipe), tmp_path / "run")
    assert recipes.run(drill.recipe) == 0, recipes.log_of(drill.recipe)
    whole = tmp_path / "whole"
    shutil.move(drill.run, whole)

    drill.disturb("feedback", signal.SIGTERM, drill.chunks(1))
    drill.disturb("feedback", signal.SIGKILL, drill.chunks(4))
    for stage in ("reward", "sft"):
        drill.disturb(stage, signal.SIGTERM, drill.steps(stage, 15))
        drill.disturb(stage, signal.SIGKILL, drill.steps(stage, 40))
    drill.disturb("rl", signal.SIGTERM, drill.steps("rl", 6))
    damaged = _flip_a_byte_of_the_newest(drill.run / "checkpoints" / "rl")
    drill.disturb("rl", signal.SIGKILL, drill.is_saving("rl", 12), poll_s=0.005)
    drill.disturb("evaluate", signal.SIGTERM, drill.has_worker("ray::GenerationWorker"), poll_s=0.2)
    drill.disturb("evaluate", signal.SIGKILL, drill.has_worker("ray::ReferenceWorker"), poll_s=0.2)
    drill.last_began = time.time()
    assert recipes.run(drill.recipe) == 0, recipes.log_of(drill.recipe)

    drill.tell(tell)
    _check_said(drill.run, damaged)
    _check_complete(drill.run)
    _check_equal(drill.run, whole)


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


def _check_said(run: Path, damaged: int) -> None:
    """The events tell every resume, the damaged checkpoint and the unfinished one."""
    resumed = {stage: [] for stage in STAGES}
    for event in recipes.events(run, "stage_resumed"):
        resumed[event["stage"]].append(event["step"])
    for stage in ("reward", "sft"):
        terminated, killed = resumed[stage]
        assert terminated >= 15, "saved when told to"
        assert killed >= 30 and killed % SAVE_EVERY[stage] == 0, "and every ten steps"
    before_damage, killed = resumed["rl"]
    every = SAVE_EVERY["rl"]
    assert before_damage == (damaged - 1) // every * every, "the newest checkpoint before the damaged one"
    assert killed >= 12 - every and killed % every == 0
    [rejected] = [event for event in recipes.events(run, "checkpoint_rejected") if event["stage"] == "rl"]
    assert rejected["path"].endswith(f"bad-step_{damaged}") and "altered bytes" in rejected["found"]
    [unfinished] = [event for event in recipes.events(run, "checkpoint_unfinished") if event["stage"] == "rl"]
    assert f".tmp-step_{killed + every}-" in unfinished["path"]
    assert len(recipes.events(run, "stopped")) == len(STAGES)
    assert [event["stage"] for event in recipes.events(run, "stage_completed")] == list(STAGES)


def _check_complete(run: Path) -> None:
    """Every verdict and every rollout once."""
    uids = [f"p/{i}" for i in range(16)]
    verdicts = Counter((row["uid"], *row["samples"]) for row in recipes.table(run, "verdicts", "feedback.*"))
    assert verdicts.keys() == {(uid, k) for uid in {key[0] for key in verdicts} for k in range(SAMPLES)}
    assert set(verdicts.values()) == {1} and len(verdicts) == len(uids) * SAMPLES
    assert len(recipes.table(run, "rankings")) == len(uids)
    rollouts = recipes.table(run, "rollouts")
    drawn = Counter((row["step"] is None, row["uid"], row["sample"]) for row in rollouts)
    assert set(drawn.values()) == {1}
    assert len(rollouts) == len(uids) * SAMPLES + RL_STEPS * PROMPTS * SAMPLES


def _check_equal(run: Path, whole: Path) -> None:
    """The disturbed run against the undisturbed one, number by number."""
    for stage in ("reward", "sft", "rl"):
        assert recipes.metrics(run, stage) == recipes.metrics(whole, stage), stage
    for kind in ("verdicts", "rankings", "rollouts", "eval"):
        assert recipes.table(run, kind) == recipes.table(whole, kind), kind
    for folder in ("reward_model", "policy"):
        files = list((whole / folder).glob("*.safetensors"))
        assert files, folder
        for file in files:
            assert (run / folder / file.name).read_bytes() == file.read_bytes(), folder
    for stage in STAGES:
        results = [json.loads((root / "stages" / f"{stage}.json").read_text())["results"] for root in (run, whole)]
        assert results[0] == results[1], stage
