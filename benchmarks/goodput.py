"""Trained tokens per hour of a run that loses a process a minute, over those of the same run left alone.

Two arms of equal wall time after their first steps. In one of them a process is sent SIGKILL every minute: a role is
drawn among those that live (generation worker, its engine, scorer, learner rank, recorder, driver), then one of its
processes. A driver that has ended is run again with the same command at once, as whoever watches over a run would do.
What counts is the history of the weights that survived: the steps up to the newest checkpoint of each arm, whose
rollouts have to be there once each. The last line is JSON; the ratio is disturbed over undisturbed, tokens are
those of the disturbed arm, and both arms take the same seconds.

    .venv/bin/python benchmarks/goodput.py [--minutes 8] [--seed 0] [--nodes 2] [--model FOLDER]

The run joins a cluster of two nodes that outlives its drivers, as runs on a cluster do. With ``--nodes 1`` each driver
starts a private cluster, which ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from rlhf.runs import checkpoint
from rlhf.runs.events import read_events
from rlhf.runs.memory import RUN_MARK, run_processes
from rlhf.runs.metrics import read_metrics
from rlhf.runs.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the tests' model and cluster
TARGET = 0.85
STAGE = "rl"
PROMPTS, SAMPLES, MAX_TOKENS, NUM_ROWS = 8, 4, 64, 64
WARM_STEPS = 3
INTERVAL_S = 60.0
START_LIMIT_S, STOP_LIMIT_S = 600.0, 180.0
TITLES = {
    "generation": "ray::GenerationWorker",
    "engine": "VLLM::",
    "scorer": "ray::ScorerWorker",
    "learner": "ray::LearnerWorker",
    "recorder": "ray::RecorderWorker",
}
"""How the processes of a role are called. The driver is the process that was started."""
LOSSES = ("replica_lost", "gang_lost", "stage_failed")
"""Events by which a driver says that it has noticed."""


def recipe(folder: Path, model: Path) -> dict[str, Any]:
    """Reward model from people's feedback, then reinforcement learning without end."""
    rows = [{"uid": f"p/{i}", "prompt": f"Write a review of a film about the sea {i}."} for i in range(NUM_ROWS)]
    said = [{"prompt": row["prompt"], "chosen": f"I loved it {i}.", "rejected": "Awful."} for i, row in enumerate(rows)]
    for name, lines in {"prompts": rows, "people": said}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    learner = {"model": {"dtype": "float32"}, "optim": {"lr": 1e-4}}
    engine = {"dtype": "float32", "max_model_len": 160, "kv_cache_gib": 0.2, "max_num_seqs": 32}
    endless = {"start_timeout_s": START_LIMIT_S, "max_restarts": 1000}
    small = {"resources": {"cpus": 0.1, **endless}}
    return {
        "name": "goodput",
        "run_dir": str(folder / "run"),
        "model": str(model),
        "max_sequence_tokens": 160,
        "sampling": {"max_tokens": MAX_TOKENS, "ignore_eos": True},
        "data": {"train": {"path": "prompts.jsonl"}},
        "roles": {
            "generation": {**small, "replicas": 2, "engine": engine},
            "scorer": {**small, "replicas": 2},
            "learner": small,
        },
        "recorder": small["resources"],
        "ray": {"num_cpus": 4, "object_store_gib": 0.3},
        "stages": [
            {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}},
            {"kind": "reward", "learner": learner, "loop": {"groups_per_step": 16}},
            {
                "kind": STAGE,
                "select_best": False,
                "learner": learner,
                "algorithm": {"name": "grpo"},
                "rewards": [{"source": "reward_model"}],
                "loop": {
                    "steps": 10**6,
                    "prompts_per_step": PROMPTS,
                    "num_samples": SAMPLES,
                    "checkpoint_every": 2,
                },
            },
        ],
    }


@dataclass(frozen=True)
class Kill:
    """One process that was killed; seconds since the epoch."""

    role: str
    at: float


@dataclass
class Arm:
    """One run in a folder of its own, its driver kept alive.

    Args:
        folder: Empty.
        model: What it trains.
        address: Cluster to join; None starts a private one with every driver.
        environment: Of its drivers.
    """

    folder: Path
    model: Path
    address: str | None
    environment: Mapping[str, str]
    kills: list[Kill] = field(default_factory=list)
    num_drivers: int = 0
    codes: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.run = self.folder / "run"
        self._mark = secrets.token_hex(8)
        self._recipe = self.folder / "recipe.yaml"
        self._recipe.write_text(yaml.safe_dump(recipe(self.folder, self.model), sort_keys=False), encoding="utf-8")
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "cluster.cli", "run", str(self._recipe)]
        command += [f"ray.address={self.address}"] if self.address else []
        environment = {**self.environment, RUN_MARK: self._mark}
        with (self.folder / "driver.log").open("a", encoding="utf-8") as log:
            self.driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.num_drivers += 1

    def keep(self) -> None:
        """Runs the command again where its driver has ended."""
        if (code := self.driver.poll()) is not None:
            self.codes[code] += 1
            self._start()

    def processes(self) -> dict[str, list[int]]:
        """Living processes by role."""
        found: dict[str, list[int]] = {"driver": [self.driver.pid]}
        for pid in sorted(run_processes(self.driver.pid, self._mark)):
            with contextlib.suppress(psutil.Error):
                title = " ".join(psutil.Process(pid).cmdline())
                for role, start in TITLES.items():
                    if title.startswith(start):
                        found.setdefault(role, []).append(pid)
        return found

    def kill(self, draw: random.Random) -> None:
        """Sends SIGKILL to a process of a role drawn at random."""
        role, pid = choose(self.processes(), draw)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills.append(Kill(role, time.time()))
            print(f"# {role} ({pid}) killed", flush=True)

    def lines(self) -> list[dict[str, Any]]:
        """The steps that the record holds."""
        path = self.run / "metrics.jsonl"
        return read_metrics(path, STAGE) if path.is_file() else []

    def warm_up(self) -> None:
        """Returns once the first steps are done."""
        deadline = time.monotonic() + START_LIMIT_S
        while len(self.lines()) < WARM_STEPS:
            if self.driver.poll() is not None or time.monotonic() > deadline:
                log = (self.folder / "driver.log").read_text(encoding="utf-8")
                raise RuntimeError(f"the first steps did not come: {log[-2000:]}")
            time.sleep(0.2)

    def live(self, seconds: float, draw: random.Random | None) -> tuple[float, float]:
        """Lets the run go on for a while, with a kill a minute where ``draw`` is given; returns when."""
        began = time.time()
        next_kill = began + INTERVAL_S / 2
        while time.time() < began + seconds:
            self.keep()
            if draw is not None and time.time() >= next_kill:
                self.kill(draw)
                next_kill += INTERVAL_S
            time.sleep(0.1)
        return began, began + seconds

    def stop(self) -> None:
        """SIGTERM: the run saves and ends; what does not end in time is killed with all that carries its mark."""
        if self.driver.poll() is None:
            self.driver.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(STOP_LIMIT_S)
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait(STOP_LIMIT_S)


def choose(processes: Mapping[str, Sequence[int]], draw: random.Random) -> tuple[str, int]:
    """A role among those that live, each as likely, and one of its processes."""
    role = draw.choice(sorted(role for role, pids in processes.items() if pids))
    return role, draw.choice(list(processes[role]))


def surviving_tokens(lines: Sequence[Mapping[str, Any]], newest: int, window: tuple[float, float]) -> float:
    """Completion tokens of the steps up to checkpoint ``newest`` that were done within a window of time."""
    began, ended = window
    kept = [line for line in lines if line["step"] <= newest and began < line["time"] <= ended]
    return sum(line["metrics"]["rollout/completion_tokens"] for line in kept)


def faults_of_record(rows: Sequence[Mapping[str, Any]], num_steps: int) -> list[str]:
    """What is wrong with the rollouts of the first ``num_steps`` steps: lost, twice, or trained out of turn."""
    counts = Counter((row["uid"], row["sample"]) for row in rows if row["step"] < num_steps)
    faults = [f"{key} {count} times" for key, count in counts.items() if count != 1]
    if len(counts) != num_steps * PROMPTS * SAMPLES:
        faults.append(f"{len(counts)} rollouts of {num_steps * PROMPTS * SAMPLES}")
    epochs = Counter(uid.partition("/")[0] for uid, sample in counts if sample == 0)
    whole = num_steps * PROMPTS // NUM_ROWS
    faults += [f"{epochs[f'e{i}']} prompts of epoch {i}" for i in range(whole) if epochs[f"e{i}"] != NUM_ROWS]
    late = [row["uid"] for row in rows for span in row["version_spans"] if span["version"] != row["step"]]
    return faults + [f"{uid} from other weights than its step's" for uid in late]


def recoveries(
    kills: Sequence[Kill], events: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds by role from a kill until the run said so (for a driver: at once), and until the next step was done.

    A step that was done again later has lost its first line, so the second figure is that of the history that survived.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for kill in kills:
        detected, recovered = found.setdefault(kill.role, ([], []))
        noticed = [e["time"] for e in events if e["kind"] in LOSSES and e["time"] >= kill.at]
        if kill.role == "driver":
            detected.append(0.0)
        elif noticed:
            detected.append(min(noticed) - kill.at)
        if later := [line["time"] for line in lines if line["time"] >= kill.at]:
            recovered.append(min(later) - kill.at)
    return found


def measure(arm: Arm, seconds: float, draw: random.Random | None) -> dict[str, Any]:
    """One arm from its start to its end."""
    try:
        arm.warm_up()
        window = arm.live(seconds, draw)
    finally:
        arm.stop()
    newest = max(checkpoint.steps(arm.run / "checkpoints" / STAGE), default=0)
    files = sorted((arm.run / "rollouts").glob(f"{STAGE}.step_*.parquet"))
    rows = [row for file in files for row in read_table(file) if row["step"] < newest]
    faults = faults_of_record(rows, newest)
    tokens = surviving_tokens(arm.lines(), newest, window)
    print(
        f"{'disturbed' if draw else 'undisturbed'}: {tokens:.0f} tokens in {seconds:.0f} s, step {newest}, "
        f"{len(arm.kills)} kills, {arm.num_drivers} drivers, exit codes {dict(arm.codes)}, "
        f"{len(faults)} faults of the record {faults[:3]}",
        flush=True,
    )
    if draw:
        events = read_events(arm.run / "events.jsonl")
        for role, (detected, recovered) in sorted(recoveries(arm.kills, events, arm.lines()).items()):
            told = [f"{statistics.median(v):.1f}" if v else "none" for v in (detected, recovered)]
            print(f"  {role:<12} {len(recovered)} times, detect_s {told[0]}, recover_s {told[1]} (medians)", flush=True)
    return {"tokens": tokens, "faults": faults}


@contextlib.contextmanager
def cluster_of(num_nodes: int) -> Iterator[tuple[str | None, dict[str, str]]]:
    """A cluster on this machine for all drivers: its address, and their environment. One node: each starts its own."""
    if num_nodes == 1:
        yield None, dict(os.environ)
        return
    from tests.joined import joined_cluster

    with joined_cluster(*[{"num_cpus": 4}] * num_nodes) as cluster:
        yield cluster.address, cluster.environment


def tiny_model(folder: Path) -> Path:
    """The two-layer model of the tests: what is measured is recovery, not arithmetic."""
    from tests.tiny import build_tiny_model

    folder.mkdir()
    return build_tiny_model(folder)


def main() -> None:
    """Measures both arms and prints the ratio."""
    parser = argparse.ArgumentParser(description="Goodput under one SIGKILL a minute.")
    parser.add_argument("--minutes", type=float, default=8.0, help="length of each arm behind its first steps")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims")
    parser.add_argument("--nodes", type=int, default=2, help="of the cluster that it joins; 1: drivers start theirs")
    parser.add_argument("--model", type=Path, help="folder of the model; a tiny one where none is given")
    arguments = parser.parse_args()
    seconds, arms = 60 * arguments.minutes, {}
    with tempfile.TemporaryDirectory() as name:
        model = arguments.model or tiny_model(Path(name) / "model")
        for kind, draw in {"undisturbed": None, "disturbed": random.Random(arguments.seed)}.items():
            (Path(name) / kind).mkdir()
            with cluster_of(arguments.nodes) as (address, environment):
                arms[kind] = measure(Arm(Path(name) / kind, model, address, environment), seconds, draw)
    own, peer = (max(arms[kind]["tokens"], 1.0) for kind in ("disturbed", "undisturbed"))
    result = {
        "name": "goodput",
        "ratio": dict.fromkeys(("median", "min", "max"), own / peer),
        "target": TARGET,
        "limit": 1.0,
        "own_seconds": seconds,
        "peer_seconds": seconds,
        "tokens_sampled": arms["disturbed"]["tokens"],  # in the history that survived each was sampled once
        "tokens_trained": arms["disturbed"]["tokens"],
        "tokens_per_hour": {kind: round(3600 * arm["tokens"] / seconds) for kind, arm in arms.items()},
        "record_faults": sum(len(arm["faults"]) for arm in arms.values()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
