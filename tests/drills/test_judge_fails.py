"""The judge is a service that fails: for some texts first, then altogether, then it comes back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.actors.judge_service import Reply, Service, completion
from tests.drills.times import step_after
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, PROMPTS, SAMPLES = 5, 8, 4
KEY_VARIABLE, KEY = "JUDGE_KEY_OF_THE_DRILL", "a-key-that-is-written-nowhere"
ERROR = "the service failed: InternalServerError"
FAIL_EVERY = 24
"""One question in so many fails: 1 or 2 of the 32 of a chunk or a step, below the tenth that may be missing."""


class FailingService(Service):
    """Says 1.0 for every text; fails for some, and while ``is_down`` for all."""

    def __init__(self) -> None:
        super().__init__()
        self.is_down = False
        self.num_failed = 0
        self._num_asked = 0
        self._lock = threading.Lock()
        self.behave = self._fail_some

    def _fail_some(self, body: dict[str, Any], tries: int) -> Reply:
        with self._lock:
            self._num_asked += 1
            fails = self.is_down or self._num_asked % FAIL_EVERY == 0
            self.num_failed += fails
        return (500, {"error": {"message": "overloaded"}}) if fails else (200, completion(-0.5, -1.5))


@pytest.fixture
def service() -> Iterator[FailingService]:
    service = FailingService()
    yield service
    service.close()


@pytest.mark.timeout(1800)
def test_what_a_judge_does_not_say_is_missing_and_never_a_number(
    tmp_path: Path,
    tiny_model_dir: Path,
    service: FailingService,
    tell: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Feedback and reinforcement learning under a judge that answers 500 for some texts, for all, then for some again.

    Passes if the run stops with 1, the typed error and no process left while everything fails, and ends with 0 when the
    same command is run after that; every refused text has a null and the service's error in the record, every other one
    what was said of it, signed by its prompt; the metrics count the nulls of each step; and the policy is the start
    model to the last bit. For the service likes all siblings alike, so that no completion is better than another,
    unless a missing score counts as a number. The service's key comes with every question and is in no file of the run.
    """
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    recipes.write_data(tmp_path)
    recipe = recipes.base(tmp_path, tiny_model_dir, _stages())
    recipe["sampling"] |= {"ignore_eos": True}  # no two siblings alike, as equal texts are asked about once
    recipe["roles"]["judge"]["endpoint"] = {
        "base_url": service.url,
        "model": "m",
        "api_key_variable": KEY_VARIABLE,
        "timeout_s": 30.0,
        "max_retries": 0,
    }
    path = recipes.write_recipe(tmp_path, recipe)
    run = tmp_path / "run"

    with recipes.running(path) as driver:
        recipes.wait_for(driver, lambda: len(recipes.metrics(run)) >= 2, poll_s=0.02)
        service.is_down = True
        failed = time.time()
        assert driver.wait(900) == 1, recipes.log_of(path)
    ended = time.time()
    recipes.assert_gone(path)
    stopped = recipes.log_of(path)
    assert "MissingFeedbackError: scores of step" in stopped and "Traceback" not in stopped
    assert f"of {PROMPTS * SAMPLES} missing" in stopped and ERROR in stopped
    logged = len(recipes.metrics(run))
    assert 2 <= logged < STEPS
    verdicts = recipes.table(run, "verdicts", "feedback.*")
    assert len(verdicts) == 16 * SAMPLES
    _check(verdicts, "value")
    assert 0 < sum(row["value"] is None for row in verdicts) <= 0.1 * len(verdicts)
    _check(recipes.table(run, "rollouts"), "score")

    service.is_down = False
    started = time.time()
    assert recipes.run(path) == 0, recipes.log_of(path)
    [resumed] = recipes.events(run, "stage_resumed")
    tell(
        "the judge answers 500 to everything",
        detect_s=ended - failed,
        recover_s=step_after(run, "rl", started) - started,
        lost_steps=logged - resumed["step"],
    )
    rows = [row for row in recipes.table(run, "rollouts") if row["step"] is not None]
    _check(rows, "score")
    assert Counter(Counter(row["uid"] for row in rows).values()) == {SAMPLES: STEPS * PROMPTS}
    missing = Counter(row["step"] + 1 for row in rows if row["score"] is None)
    metrics = {line["step"]: line["rollout/missing_scores"] for line in recipes.metrics(run)}
    assert metrics == {step: missing[step] for step in range(1, STEPS + 1)}
    assert sum(missing.values()) > 0, "the run goes on with some scores missing"
    assert service.num_failed > sum(missing.values())
    _check_unchanged(run / "policy", tiny_model_dir)
    assert set(service.keys) == {f"Bearer {KEY}"}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def _stages() -> list[dict[str, Any]]:
    return [
        {"kind": "feedback", "loop": {"num_samples": SAMPLES, "prompts_per_chunk": 8}},
        {
            "kind": "rl",
            "select_best": False,
            "learner": recipes.learner(),
            "algorithm": {"name": "grpo"},
            "rewards": [{"source": "judge"}],
            "loop": {"steps": STEPS, "prompts_per_step": PROMPTS, "num_samples": SAMPLES, "checkpoint_every": 1},
        },
    ]


def _check(rows: list[dict[str, Any]], column: str) -> None:
    """A value is what the service says, 1.0 with the sign of the prompt's wish; a null carries the service's error."""
    assert rows
    for row in rows:
        if row[column] is None and row.get("step", 0) is not None:
            assert row["error"].endswith(ERROR), row
        elif row[column] is not None:
            assert row[column] == (-1.0 if "scathing" in row["prompt"] else 1.0)
            assert row["error"] == ""


def _check_unchanged(policy: Path, start: Path) -> None:
    before, after = load_file(start / "model.safetensors"), load_file(policy / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
