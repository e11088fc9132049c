"""The end of a run: the summary, the model cards, and where everything is."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.context import Policy, latest_policy
from rlhf.evaluation.criteria import check_criteria
from rlhf.evaluation.report_card import EvalSummary
from rlhf.runs.directory import RunDirectory
from rlhf.runs.files import read_json, replacing_folder, share_file
from rlhf.runs.memory import read_peak_memory
from rlhf.runs.model_card import write_policy_card, write_reward_model_card
from rlhf.runs.report import write_report
from rlhf.runs.summary import FeedbackSummary, RewardModelSummary, Summary, format_summary, write_summary
from rlhf.runs.timings import Timings


def summarise(config: RunConfig, root: Path) -> None:
    """Writes ``summary.json`` and prints the results; says what is left where stages are still open."""
    run = RunDirectory(root)
    keep_policy(config, run)
    left = [stage.name for stage in config.stages if not run.is_complete(stage.name)]
    if left:
        print(f"{root}: stages left: {', '.join(left)}")
        print("next     all of them:\n" + command_line("run", run.config, f"run_dir={root}"))
        return
    summary = build_summary(config, run)
    write_summary(run.summary, summary)
    if run.policy.is_dir():
        write_policy_card(run.policy, summary, run.resolved_config())
    if run.reward_model.is_dir():
        write_reward_model_card(run.reward_model, summary, run.resolved_config())
    print(format_summary(summary))
    print(f"model    {run.policy}" if run.policy.is_dir() else f"run      {root}")
    print(f"summary  {run.summary}")
    print(f"report   {write_report(root)}")
    print("next     open the report in a browser, or type one of these:\n" + "\n".join(next_commands(config, run)))


def next_commands(config: RunConfig, run: RunDirectory) -> list[str]:
    """What to type after a complete run: the report once more, and the same recipe with other settings elsewhere."""
    number = 2
    while (elsewhere := run.root.with_name(f"{run.root.name}-{number}")).exists():
        number += 1
    return [
        command_line("report", run.root),
        command_line("run", run.config, f"run_dir={elsewhere}", f"seed={config.seed + 1}"),
    ]


def command_line(*arguments: str | Path) -> str:
    """An ``rlhf`` command as a shell reads it."""
    return shlex.join(["rlhf", *map(str, arguments)])


def keep_policy(config: RunConfig, run: RunDirectory) -> None:
    """Makes ``RUN/policy`` what the last complete stage with a policy left, whole or not at all; files are shared."""
    nothing = Policy(run.policy, 0)
    found = latest_policy(config, run, nothing).path
    if found == run.policy:
        return
    with replacing_folder(run.policy) as partial:
        shutil.copytree(found, partial, copy_function=_share, dirs_exist_ok=True)


def _share(source: str, target: str) -> str:
    share_file(Path(source), Path(target))
    return target


def build_summary(config: RunConfig, run: RunDirectory) -> Summary:
    """Gathers the results of all stages."""
    results = {stage.kind: run.results(stage.name) for stage in config.stages}
    timings = Timings(run.timings)
    peak = read_peak_memory(run)
    evaluation = _evaluation(results.get("evaluate"))
    passed: dict[str, bool] = {}
    if evaluation is not None and config.criteria is not None:
        passed = check_criteria(evaluation, peak, config.criteria)
    versions: dict[str, str] = read_json(run.environment)["packages"]
    return Summary(
        recipe=config.name,
        seed=config.seed,
        eval=evaluation,
        feedback=FeedbackSummary.model_validate(results["feedback"]) if "feedback" in results else None,
        reward_model=_reward_model(results.get("reward")),
        timings=timings.totals(),
        throughput=timings.throughput(),
        peak_memory_gib=peak,
        versions=versions,
        passed=passed,
        notes=_notes(config) + results.get("evaluate", {}).get("notes", []),
    )


def _evaluation(results: Mapping[str, Any] | None) -> EvalSummary | None:
    return None if results is None else EvalSummary.model_validate(results["eval"])


def _reward_model(results: Mapping[str, Any] | None) -> RewardModelSummary | None:
    if results is None:
        return None
    return RewardModelSummary.model_validate(
        {name: results[name] for name in RewardModelSummary.model_fields if name in results}
    )


def _notes(config: RunConfig) -> list[str]:
    notes = []
    feedback = [stage for stage in config.stages if stage.kind == "feedback"]
    judged = any(stage.source == "judge" for stage in feedback)
    if judged and config.roles.judge.model is None and config.roles.judge.endpoint is None:
        notes.append("The judge has the policy's own starting weights: it judges its own kind.")
    if config.shuffle_verdicts:
        notes.append("Null arm: the verdicts were shuffled, so nothing should improve.")
    if config.ray.address is not None:
        notes.append(
            "Peak memory counts this run's processes on the driver's machine: not Ray's own, which the run did not "
            "start, and none on other nodes."
        )
    return notes
