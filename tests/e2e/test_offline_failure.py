"""A fault that the ranks of an offline stage find ends the command in one line and its own exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.runs.events import read_events
from tests.e2e import recipes


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_fault_in_the_ranks_is_one_line_and_its_exit_code(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipes.write_data(tmp_path)
    pair = {"prompt": "Write a review.", "chosen": "I loved it.", "rejected": "Awful."}
    (tmp_path / "people.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    stages = [
        {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}},
        {"kind": "reward", "learner": recipes.learner()},
    ]
    recipe = recipes.base(tmp_path, tiny_model_dir, stages)
    recipe["roles"]["learner"]["ranks"] = 2
    path = recipes.write_recipe(tmp_path, recipe)
    assert recipes.run(path) == 2, recipes.log_of(path)
    log = recipes.log_of(path)
    said = [line for line in log.splitlines() if line.startswith("DataError")]
    assert said == [
        "DataError: stage reward: found 1 of 1 prompts of the feedback stage to learn from; needed at least 2. "
        "Collect more feedback; only prompts whose completions differ in rank count."
    ]
    assert "Traceback" not in log
    kinds = [event["kind"] for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert "gang_lost" not in kinds and kinds.count("stage_started") == 2
