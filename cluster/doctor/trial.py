"""One small run for real: a generation by vLLM, an update by DeepSpeed, a publication, a generation by the new weights.

It is ``rlhf run`` itself, with a recipe of two steps on a tiny model, in a process and a folder of its own. What it did
is read from its record.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.doctor.findings import Check, must
from cluster.watchdog import CLUSTER_MARK
from rlhf.errors import RecordError
from rlhf.runs.events import read_events
from rlhf.runs.memory import RUN_MARK
from rlhf.runs.metrics import read_metrics
from rlhf.runs.tables import read_table
from rlhf.runs.timings import Timings

ROOT = Path(__file__).resolve().parents[2]
"""What holds the three packages."""

MODEL_LIMIT_S = 300.0
RUN_LIMIT_S = 900.0
STEPS, PROMPTS, SAMPLES, TOKENS = 2, 4, 4, 16
STEPS_OF_A_TRIAL = ("Ray", "generation", "update", "publication", "end")
_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception|Exit): ")


def check_trial(num_gpus: int, address: str | None, folder: Path | None) -> list[Check]:
    """Does the run and returns a finding for each of its steps.

    Args:
        num_gpus: How many GPUs it may use; with one, generation and learner take turns on it.
        address: Cluster to join; None starts a private one on this machine.
        folder: Where its files go for a while: on storage that all nodes share, where a cluster is joined. None is the
            system's folder for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-", dir=folder) as name:
        scratch = Path(name)
        command = [sys.executable, "-m", "cluster.doctor.tiny_model", str(scratch / "model")]
        code, seconds = _run(command, scratch / "model.log", MODEL_LIMIT_S)
        if code != 0:
            fault = _last_error(scratch / "model.log", code, MODEL_LIMIT_S)
            return [must("trial: model", False, fault, "a tiny model, built and saved", "Run `make setup`.")]
        checks = [must("trial: model", True, f"built in {seconds:.1f} s", "a tiny model, built and saved", "")]
        recipe = _write_recipe(scratch, num_gpus, address)
        began = time.time()
        code, _ = _run([sys.executable, "-m", "cluster.cli", "run", str(recipe)], scratch / "run.log", RUN_LIMIT_S)
        return checks + judge_trial(scratch / "run", began, code, _last_error(scratch / "run.log", code, RUN_LIMIT_S))


def recipe_of(scratch: Path, num_gpus: int, address: str | None) -> dict[str, Any]:
    """The recipe of the trial; the model is in ``scratch/model``."""
    resources: dict[str, Any] = {"cpus": 0.1, "max_restarts": 0, "start_timeout_s": 400.0, "call_timeout_s": 300.0}
    engine: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    if num_gpus == 1:
        resources["gpus"] = 0.4
        engine |= {"enable_sleep": True, "gpu_memory_utilization": 0.3}
    elif num_gpus:
        resources["gpus"] = 1
        engine["gpu_memory_utilization"] = 0.3
    rules = [{"rule": "repetition", "n": 1}, {"rule": "finished"}]
    return {
        "name": "doctor",
        "run_dir": str(scratch / "run"),
        "model": str(scratch / "model"),
        "max_sequence_tokens": 128,
        "sampling": {"max_tokens": TOKENS},
        "data": {"train": {"path": str(scratch / "prompts.jsonl")}},
        "gate": ("exclusive", "shared")[num_gpus] if num_gpus < 2 else "open",
        "roles": {
            "generation": {"resources": resources, "engine": engine, "bucket_mib": 0.1},
            "learner": {"resources": resources},
        },
        "ray": {"object_store_gib": 0.2} | ({"address": address} if address else {"num_cpus": 2}),
        "stages": [
            {
                "kind": "rl",
                "select_best": False,
                "learner": {"optim": {"lr": 1e-3}},
                "algorithm": {"name": "grpo"},
                "rewards": [{"source": "rules", "rules": rules}],
                "loop": {"steps": STEPS, "prompts_per_step": PROMPTS, "num_samples": SAMPLES},
            }
        ],
    }


def _write_recipe(scratch: Path, num_gpus: int, address: str | None) -> Path:
    rows = [json.dumps({"uid": f"doctor/{i}", "prompt": f"Say {i}."}) for i in range(STEPS * PROMPTS)]
    (scratch / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = scratch / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(scratch, num_gpus, address)), encoding="utf-8")  # JSON is YAML
    return path


def _run(command: list[str], log: Path, limit_s: float) -> tuple[int | None, float]:
    """Exit code, None where the time was over, and seconds; what it printed is in ``log``."""
    environment = {name: value for name, value in os.environ.items() if name not in (RUN_MARK, CLUSTER_MARK)}
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where this process is interrupted; a run's own watchdog ends what it had started
            process.kill()
            process.wait(60.0)
    return code, time.monotonic() - began


def _last_error(log: Path, code: int | None, limit_s: float) -> str:
    """What a process said last, errors first."""
    if code is None:
        return f"no end after {limit_s:.0f} s"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [f"exit code {code} without a word"])[-1]


def judge_trial(run: Path, began: float, code: int | None, error: str) -> list[Check]:
    """One finding per step; the first that was not reached has the run's error.

    Args:
        run: The run directory.
        began: When it was started, seconds since the epoch.
        code: Its exit code; None where the time was over.
        error: What it said last.
    """
    reached = _reached(run, began, code)
    needed = {
        "Ray": "a cluster that starts, or lets a run in",
        "generation": f"completions of {PROMPTS} prompts by vLLM",
        "update": "an update by DeepSpeed, every number finite",
        "publication": "completions by the updated weights",
        "end": "exit code 0",
    }
    action = (
        "Mend what the error names. If it names nothing: the logs of Ray's workers are in session_latest/logs of its "
        "temporary folder (/tmp/ray); a larger machine, or less on it, where the time was over."
    )
    checks, failed = [], False
    for step in STEPS_OF_A_TRIAL:
        if failed:
            checks.append(must(f"trial: {step}", False, "not reached", needed[step], "See above."))
        elif step in reached:
            checks.append(must(f"trial: {step}", True, reached[step], needed[step], ""))
        else:
            failed = True
            checks.append(must(f"trial: {step}", False, error, needed[step], action))
    return checks


def _reached(run: Path, began: float, code: int | None) -> dict[str, str]:
    """The steps that were done, with their seconds."""
    events = read_events(run / "events.jsonl")
    seconds = Timings(run / "timings.json").totals()
    start, stage = seconds.get("start", {}), seconds.get("rl", {})
    drawn = {step: versions for step in range(STEPS) if (versions := _versions(run, step))}
    reached: dict[str, str] = {}
    if started := [event["time"] for event in events if event["kind"] == "stage_started"]:
        reached["Ray"] = f"up in {started[0] - began:.1f} s"
    joined = [event["seconds"] for event in events if event["kind"] == "replica_joined" and _is_engine(event)]
    if joined and 0 in drawn:
        reached["generation"] = f"engine ready in {joined[0]:.1f} s, drew for {stage.get('generation', 0.0):.1f} s"
    if updates := [line for line in read_metrics(run / "metrics.jsonl", "rl") if _is_sound(line)]:
        parts = f"learner ready in {start.get('learner', 0.0):.1f} s, {len(updates)} updates"
        reached["update"] = f"{parts} in {stage.get('learner', 0.0):.1f} s"
    if drawn.get(1) == {1}:
        reached["publication"] = f"weights sent in {stage.get('publish', 0.0):.1f} s"
    if code == 0:
        reached["end"] = f"after {time.time() - began:.1f} s, nothing left behind"
    return reached


def _is_engine(event: Mapping[str, Any]) -> bool:
    return event.get("role") == "generation"


def _is_sound(line: Mapping[str, Any]) -> bool:
    return line["non_finite"] == 0 and line["metrics"].get("learner/skipped") == 0


def _versions(run: Path, step: int) -> set[int]:
    """The weight versions that drew the rollouts of a step; none where there are no rollouts."""
    try:
        rows = read_table(run / "rollouts" / f"rl.step_{step:06d}.parquet")
    except RecordError:
        return set()
    return {span["version"] for row in rows for span in row["version_spans"]}
