"""One of two ranks has a gradient that is not finite: both skip together, and three in a row end the run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.drills.faulty_run import FAULTY_UPDATES
from tests.drills.times import step_after
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, PROMPTS, SAMPLES = 8, 4, 2


@pytest.mark.timeout(1800)
def test_ranks_skip_together_and_three_skips_in_a_row_end_the_run(
    tmp_path: Path, tiny_model_dir: Path, tell: Callable[..., None]
) -> None:
    """A NaN on rank 1 of a ZeRO-2 gang in update 2, then in updates 5, 6 and 7; then the same run with sound ranks.

    Passes if the second update leaves weights and optimizer state of both ranks as they were and the third changes
    them; metrics and events count the skips; the run ends with 1 and the typed error at update 7, whose batch is in the
    record; and the same command with sound learners ends with 0, every prompt trained exactly once.
    """
    recipes.write_data(tmp_path)
    stages = [
        {
            "kind": "rl",
            "select_best": False,
            "learner": recipes.learner() | {"deepspeed": {"zero_stage": 2}},
            "algorithm": {"name": "grpo"},
            "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 1}, {"rule": "finished"}]}],
            "keep_checkpoints": STEPS,
            "loop": {"steps": STEPS, "prompts_per_step": PROMPTS, "num_samples": SAMPLES, "checkpoint_every": 1},
        }
    ]
    recipe = recipes.base(tmp_path, tiny_model_dir, stages)
    recipe["sampling"]["max_tokens"] = 24
    recipe["roles"]["learner"]["ranks"] = 2
    recipe["roles"]["learner"]["resources"]["threads"] = 1
    path = recipes.write_recipe(tmp_path, recipe)
    run = tmp_path / "run"

    with recipes.running(path, module="tests.drills.faulty_run") as driver:
        assert driver.wait(900) == 1, recipes.log_of(path)
    assert "NonFiniteError: learner rank" in recipes.log_of(path)
    metrics = recipes.metrics(run)
    assert [line["learner/skipped"] for line in metrics] == [0, 1, 0, 0, 1, 1]
    assert [line["learner/consecutive_skips"] for line in metrics] == [0, 1, 0, 0, 1, 2]
    skips = [(event["step"], event["batch"]) for event in recipes.events(run, "update_skipped")]
    assert skips == [(step, f"rollouts/rl.step_{step - 1:06d}.parquet") for step in FAULTY_UPDATES[:3]]
    assert all((run / batch).is_file() for _, batch in skips)
    assert (run / "rollouts" / "rl.step_000006.parquet").is_file(), "the batch that ended the run is kept"
    states = {step: _state(run, step) for step in range(1, 7)}
    unchanged = {step for step in range(2, 7) if _equal(states[step - 1], states[step])}
    assert unchanged == {2, 5, 6}
    recipes.assert_gone(path)
    started = time.time()
    assert recipes.run(path) == 0, recipes.log_of(path)
    [resumed] = recipes.events(run, "stage_resumed")
    recover_s = step_after(run, "rl", started) - started
    tell("three updates in a row are not finite", recover_s=recover_s, lost_steps=len(metrics) - resumed["step"])
    assert [line["learner/skipped"] for line in recipes.metrics(run)] == [0, 1, 0, 0, 1, 1, 0, 0]
    counts = Counter(row["uid"] for row in recipes.table(run, "rollouts"))
    assert len(counts) == STEPS * PROMPTS and set(counts.values()) == {SAMPLES}


def _state(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """What each rank has saved: its fp32 weights and the optimizer's two means; random states are left out."""
    files = sorted((run / "checkpoints" / "rl" / f"step_{step}" / "learner").glob("*.safetensors"))
    assert len(files) == 2, "one a rank"
    found = {file.name: load_file(file) for file in files}
    return {file: {name: tensor for name, tensor in tensors.items() if "/" in name} for file, tensors in found.items()}


def _equal(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    assert one.keys() == other.keys() and all(one[file] for file in one)
    return all(
        one[file].keys() == other[file].keys()
        and all(torch.equal(tensor, other[file][name]) for name, tensor in one[file].items())
        for file in one
    )
