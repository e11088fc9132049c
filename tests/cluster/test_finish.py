"""The end of a run: the summary of what its stages left, and what a reader is told beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import build_parser
from cluster.config import RunConfig, load_run_config
from cluster.finish import build_summary, summarise
from rlhf.config import validate
from rlhf.evaluation.bootstrap import BootstrapConfig
from rlhf.evaluation.instruments import RESULTS, Instruments
from rlhf.evaluation.report_card import ReportCardConfig, grade
from rlhf.runs.directory import RunDirectory
from rlhf.runs.memory import read_peak_memory, write_peak_memory
from rlhf.runs.summary import read_summary
from rlhf.runs.timings import Timings
from tests.rlhf.evaluation.rows import eval_rows

CARD = ReportCardConfig(bootstrap=BootstrapConfig(num_resamples=100))
PEOPLE = {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}
RL = {
    "kind": "rl",
    "rewards": [{"source": "rules", "rules": [{"rule": "repetition"}]}],
    "loop": {"steps": 1, "prompts_per_step": 2, "num_samples": 2},
}
REWARD_RESULTS = {
    "num_groups": 8,
    "num_held_out": 2,
    "pair_accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6},
    "kendall_tau": {"mean": 0.1, "low": 0.0, "high": 0.2},
    "num_pairs": 9,
}
EVAL_KEYS = {"num_prompts", "num_completions", "before", "after", "best_of_n", "delta", "win_rate", "slices"}
EVAL_KEYS |= {"worst_slice", "missing", "confidence"}


def recipe(*stages: dict[str, Any], **changes: Any) -> RunConfig:
    data = {name: {"path": f"{name}.jsonl"} for name in ("train", "evaluation")}
    document = {"name": "x", "model": "m", "data": data, "stages": list(stages), **changes}
    return validate(RunConfig, document, "test")


def finished(root: Path, config: RunConfig, results: dict[str, dict[str, Any]]) -> RunDirectory:
    with RunDirectory.open(root, config) as run:
        for stage, found in results.items():
            run.complete(stage, found)
        timings = Timings(run.timings)
        timings.add("rl/learner", 60.0)
        timings.add_tokens("generation", 100, 2.0)
        timings.write()
        write_peak_memory(run, 3.0)
    return run


def judged_evaluation() -> dict[str, Any]:
    return {"eval": grade(eval_rows(8), CARD).model_dump(mode="json"), "notes": Instruments({}).notes()}


def bare_evaluation() -> dict[str, Any]:
    nothing = Instruments(dict.fromkeys(RESULTS, "it is not here"))
    rows = [
        dataclasses.replace(row, request="", subject="", vader=None, judge_margin=None, reward_model=None)
        for row in eval_rows(8)
        if row.arm != "best_of_n"
    ]
    report = grade(rows, CARD, unmeasured=nothing.unmeasured).model_dump(mode="json")
    return {"eval": report, "notes": nothing.notes()}


def test_a_judged_run_has_every_part_and_says_whose_weights_judged(tmp_path: Path) -> None:
    judged = {"kind": "feedback"}
    constitutions = {"training": "c.yaml", "evaluation": "c.yaml"}
    stages = [judged, {"kind": "reward"}, RL, {"kind": "evaluate"}]
    config = recipe(*stages, constitutions=constitutions, criteria={"min_prompts": 8}, shuffle_verdicts=True)
    results = {
        "feedback": {"source": "judge", "num_rankings": 4, "num_verdicts": 16, "missing_fraction": 0.0},
        "reward": REWARD_RESULTS,
        "rl": {"policy": "policy", "version": 1},
        "evaluate": judged_evaluation(),
    }
    run = finished(tmp_path / "run", config, results)
    summary = build_summary(config, run)
    document = json.loads(summary.model_dump_json())
    assert set(document["eval"]) == EVAL_KEYS
    assert document["eval"]["slices"].keys() == {"enthusiastic", "scathing"}
    assert summary.feedback is not None and summary.feedback.num_rankings == 4
    assert summary.reward_model is not None and summary.reward_model.num_pairs == 9
    assert summary.timings["rl"]["learner"] == 60.0 and summary.throughput == {"generation": 50.0}
    assert summary.peak_memory_gib == read_peak_memory(run) == 3.0
    assert summary.passed["num_prompts"] and summary.passed["peak_memory"]
    assert any("own starting weights" in note for note in summary.notes)
    assert any("Null arm" in note for note in summary.notes)
    assert not any("evaluation has no" in note for note in summary.notes)


def test_a_run_for_people_names_what_its_evaluation_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(PEOPLE, {"kind": "sft", "data": {"path": "x.jsonl"}}, {"kind": "evaluate"}, criteria={})
    results = {
        "feedback": {"source": "people", "num_rankings": 4},
        "sft": {"policy": "sft/policy", "version": 1},
        "evaluate": bare_evaluation(),
    }
    run = finished(tmp_path / "run", config, results)
    (run.root / "sft" / "policy").mkdir(parents=True)
    summarise(config, run.root)
    summary = read_summary(run.summary)
    assert summary.eval is not None
    assert "length" in summary.eval.after
    assert not summary.passed["win_rate"], "what was not shown was not reached"
    left_out = {metric for metrics in RESULTS.values() for metric in metrics}
    assert all(any(metric in note for note in summary.notes) for metric in left_out)
    printed = capsys.readouterr().out
    assert "note: The evaluation has no judge_margin and no win_rate" in printed
    page = run.report.read_text(encoding="utf-8")
    assert "has no follows_request" in page
    assert "by slice" not in page, "no table without rows"


def test_a_run_with_stages_left_has_no_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(PEOPLE, {"kind": "reward"})
    run = finished(tmp_path / "run", config, {"feedback": {"source": "people", "num_rankings": 4}})
    summarise(config, run.root)
    printed = capsys.readouterr().out
    assert "stages left: reward" in printed
    assert not run.summary.exists()
    [command] = commands_in(printed)
    again = load_run_config(command.config, command.overrides)
    assert again.directory == run.root and [stage.name for stage in again.stages] == ["feedback", "reward"]


def test_a_complete_run_says_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(PEOPLE)
    run = finished(tmp_path / "my run", config, {"feedback": {"source": "people", "num_rankings": 4}})
    (tmp_path / "my run-2").mkdir()
    summarise(config, run.root)
    printed = capsys.readouterr().out
    assert re.search(r"^next +\S", printed, flags=re.MULTILINE)
    report, again = commands_in(printed)
    assert (report.command, report.run) == ("report", run.root)
    other = load_run_config(again.config, again.overrides)
    assert other.directory == tmp_path / "my run-3", "a folder that nothing is in"
    assert (other.name, other.seed) == (config.name, config.seed + 1)


def commands_in(printed: str) -> list[argparse.Namespace]:
    """The command lines of ours, as the parser reads them."""
    lines = [line for line in printed.splitlines() if line.startswith("rlhf ")]
    return [build_parser().parse_args(shlex.split(line)[1:]) for line in lines]


def test_exported_models_get_their_cards(tmp_path: Path) -> None:
    config = recipe(PEOPLE, {"kind": "reward"}, RL)
    results = {
        "feedback": {"source": "people", "num_rankings": 4},
        "reward": REWARD_RESULTS,
        "rl": {"policy": "policy", "version": 1},
    }
    run = finished(tmp_path / "run", config, results)
    run.policy.mkdir()
    run.reward_model.mkdir()
    summarise(config, run.root)
    assert "x: policy" in (run.policy / "README.md").read_text(encoding="utf-8")
    assert "x: reward model" in (run.reward_model / "README.md").read_text(encoding="utf-8")
    assert read_summary(run.summary).eval is None
