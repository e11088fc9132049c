"""A small run directory with every record that a finished run leaves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from actors.recorder import RecorderWorker
from actors.store import LocalStore
from rlhf.config import StrictModel
from rlhf.evaluation.bootstrap import BootstrapConfig
from rlhf.evaluation.completions import to_wide
from rlhf.evaluation.criteria import CriteriaConfig, check_criteria
from rlhf.evaluation.report_card import ReportCardConfig, grade
from rlhf.evaluation.reward_model import kendall_tau, pair_accuracy
from rlhf.runs.directory import RunDirectory
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.summary import FeedbackSummary, RewardModelSummary, Summary, write_summary
from rlhf.runs.tables import EVAL, write_table
from rlhf.runs.timings import Timings
from rlhf.types import Completion, GroupHandle, Message, Prompt, Rollout, RolloutGroup, Verdict, VersionSpan
from tests.rlhf.evaluation.rows import eval_rows

HOSTILE = "<script>alert('x')</script> & \"quotes\" </textarea><img src=x onerror=alert(1)>"


class StageConfig(StrictModel):
    name: str = "rl"
    kind: str = "rl"
    loop: dict[str, int] = {"steps": 30, "prompts_per_step": 16}
    algorithm: dict[str, str] = {"name": "grpo"}


class DemoConfig(StrictModel):
    name: str = "quickstart"
    seed: int = 1
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    data: dict[str, dict[str, str]] = {"train": {"path": "configs/data/train.jsonl"}}
    stages: tuple[StageConfig, ...] = (StageConfig(name="ask", kind="feedback"), StageConfig())


def demo_summary(num_prompts: int = 40) -> Summary:
    """A summary with every part."""
    evaluation = grade(eval_rows(num_prompts, before=0.55, after=0.85), ReportCardConfig())
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 4)) - np.arange(4)
    ranks = [[1, 2, 3, 4]] * 40
    config = BootstrapConfig()
    accuracy = pair_accuracy(scores.tolist(), ranks, config)
    return Summary(
        recipe="quickstart",
        seed=1,
        eval=evaluation,
        feedback=FeedbackSummary(
            source="judge", num_rankings=200, num_verdicts=800, missing_fraction=0.0125, judge_agreement=accuracy
        ),
        reward_model=RewardModelSummary(
            pair_accuracy=accuracy,
            kendall_tau=kendall_tau(scores.tolist(), ranks, config),
            num_pairs=240,
            judge_agreement=accuracy,
        ),
        timings={
            "feedback": {"generate": 210.5, "judge": 160.0},
            "reward": {"train": 240.0},
            "rl": {"generate": 400.0, "score": 60.0, "update": 480.0, "publish": 20.0},
            "eval": {"generate": 90.0, "judge": 60.0},
        },
        throughput={"generation": 512.3, "judge": 2301.0, "learner": 640.0},
        peak_memory_gib=9.4,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        passed=check_criteria(evaluation, 9.4, CriteriaConfig(min_prompts=num_prompts + 1)),
        notes=["The judge has the same weights as the starting model: it judges its own kind."],
    )


def build_finished_run(root: Path, text: str = HOSTILE) -> RunDirectory:
    """Writes every record; ``text`` stands in a verdict, a sample, a reason and an event."""
    with RunDirectory.open(root, DemoConfig()) as run:
        logger = MetricsLogger(run.metrics)
        rng = np.random.default_rng(0)
        for step in range(30):
            wave = float(rng.normal() * 0.05)
            logger.log(
                "rl",
                step,
                {
                    "rollout/score": math.tanh(step / 12) + wave,
                    "learner/kl": 0.002 * step + abs(wave) / 10,
                    "learner/entropy": 2.4 - 0.02 * step + wave,
                    "learner/policy_loss": wave,
                    "learner/grad_norm": float("nan") if step == 11 else 1.0 + abs(wave),
                    "rollout/completion_length": 40.0 + 10 * wave,
                    "publish/seconds": 0.4,
                },
            )
        for step in range(20):
            logger.log("reward", step, {"rank_loss": 0.7 - 0.01 * step, "pair_accuracy": 0.5 + 0.01 * step})
        run.events.record("replica_restarted", role="generation", replica=0, found=text)
        recorder = RecorderWorker(run.root, LocalStore())
        write_table(run.eval / "completions.parquet", to_wide(eval_rows(8)), EVAL)
        prompt = Prompt("train/0", (Message("user", "Write a scathing review. " + text),), (1, 2, 3), {})
        completion = Completion(
            np.zeros(2, np.int32), np.zeros(2, np.float32), "Dull. " + text, "stop", (VersionSpan(0, 0, 2),)
        )
        handle = GroupHandle("train/0", RolloutGroup(prompt, (Rollout(completion),) * 2), 3, (2, 2), (0, 0))
        verdicts = [
            Verdict("train/0", (0,), 1.3, "negative -0.2, positive -1.7 " + text, "tiny"),
            Verdict("train/0", (1,), None, error="timed out " + text),
        ]
        recorder.record_verdicts("ask", "chunk_0000", [handle], [verdicts])
        other = Verdict("train/0", (0,), 0.0, "of the training, not of the feedback")
        recorder.record_verdicts("a-stage-before", "step_000000", [handle], [[other]])
        timings = Timings(run.timings)
        timings.add("rl/generate", 400.0)
        timings.write()
        write_summary(run.summary, demo_summary())
    return run
