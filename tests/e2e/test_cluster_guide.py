"""``docs/cluster.md`` followed word for word: two nodes, submit, watch, scale, losses, cancel, go on, the record."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.placement import KEEP_ENVIRONMENT
from tests.e2e import recipes
from tests.e2e.two_nodes import free_ports

DOCUMENT = recipes.ROOT / "docs" / "cluster.md"
FIRST, LAST = "## Two nodes, step by step", "## KubeRay"
OTHER_MACHINES = "10.0.0.1"
"""In the commands for nodes that are machines of their own, and in no other."""

PORTS = ("6379", "8265", "52366", "52367", "52368", "52369")
PROMPTS, SAMPLES = 4, 2
FOREVER, STEPS_AFTER_CANCEL = 10**5, 3


def commands() -> list[str]:
    """The indented blocks of the guide that are for one machine, in order."""
    part = DOCUMENT.read_text(encoding="utf-8").split(FIRST)[1].split(LAST)[0]
    texts = re.split(r"^(?=\S)", part, flags=re.MULTILINE)  # each with what is indented below its line
    indented = [re.search(r"^ {4}.*", text, flags=re.MULTILINE | re.DOTALL) for text in texts]
    blocks = [textwrap.dedent(found[0]).strip() for found in indented if found is not None]
    return [block for block in blocks if OTHER_MACHINES not in block]


def test_the_guide_has_every_step_in_order() -> None:
    steps = (
        "--head",
        "--no-wait",
        "--follow",
        "--status",
        "=3",
        "=1",
        "52368",
        "kill",
        "--no-wait",
        "--cancel",
        "submit",
    )
    blocks = iter(commands())
    assert [step for step in steps if not any(step in block for block in blocks)] == []
    assert any("read_parquet" in block for block in blocks), "and then the record"


class Terminal:
    """A user's shell with a home of its own, in which the guide's names stand for this test's.

    Args:
        folder: For home, storage, programs and output. Ray's sockets lie below it, and their paths are short.
        recipe: What is run in the place of the guide's.
    """

    def __init__(self, folder: Path, recipe: Path) -> None:
        self._folder = folder
        self.storage, self._home = folder / "shared", folder / "home"
        for made in (self.storage, self._home, folder / "bin"):
            made.mkdir()
        program = folder / "bin" / "rlhf"  # this tree's, where the environment's may be another one's
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cluster.cli "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        (folder / "variables").touch()
        ports = free_ports(len(PORTS) + 3)
        own = zip(("dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port"), ports, strict=False)
        self._named = dict(zip(PORTS, map(str, ports[3:]), strict=True))
        self.second_port = self._named["52368"]
        self._named |= {
            "configs/quickstart.yaml": str(recipe),
            "/shared": str(self.storage),
            "--head": " ".join(["--head", *(f"--{name}={port}" for name, port in own)]),  # another cluster has its own
        }
        left_out = (*recipes.MARKS, "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")
        self._environment = {name: value for name, value in os.environ.items() if name not in left_out}
        self._environment |= {
            "HOME": str(self._home),
            "RAY_TMPDIR": str(folder),
            "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            **KEEP_ENVIRONMENT,
        }

    def _start(self, block: str, log: Path) -> subprocess.Popen[bytes]:
        for name, own in self._named.items():
            block = re.sub(rf"(?<![\w/]){re.escape(name)}(?![\w])", own, block)
        kept = self._folder / "variables"  # what one block exports the next ones have
        script = f"set -e\n. {kept}\n{block}\nexport -p > {kept}\n"
        with log.open("wb") as output:  # no pipe: what stays behind would hold it open
            return subprocess.Popen(
                ["bash", "-c", script],
                cwd=recipes.ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, block: str, timeout_s: float = 900.0) -> str:
        """Runs commands to their end, which has to be a good one, and returns what they said."""
        log = self._folder / "said"
        code = self._start(block, log).wait(timeout_s)
        if code and "--head" in block:  # Ray gives a node half a minute to start, which a busy machine may not have
            self.close()
            code = self._start(block, log).wait(timeout_s)
        said = log.read_text(encoding="utf-8", errors="replace")
        assert code == 0, f"{code} from\n{block}\n{said}"
        return said

    def follow(self, block: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Starts commands as in a terminal beside; returns their process and the file of what they say."""
        log = self._folder / "followed"
        return self._start(block, log), log

    def processes(self) -> list[psutil.Process]:
        """All that was started here, at whatever distance, and lives."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("HOME") == str(self._home)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def titles_on_second_node(self) -> list[str]:
        """What runs on the second node; ``ray::`` and the class for actors."""
        [raylet] = [
            process
            for process in self.processes()
            if process.name() == "raylet" and any(self.second_port in word for word in process.cmdline())
        ]
        return recipes.titles_below(raylet.pid)

    def close(self) -> None:
        """Ends what is left: ``ray stop`` would end other clusters of this machine too."""
        deadline = time.monotonic() + 60.0
        for process in self.processes():
            if process.name() in ("raylet", "gcs_server"):
                with contextlib.suppress(psutil.Error):
                    process.terminate()
        while left := self.processes():
            for process in left if time.monotonic() > deadline - 50.0 else ():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.2)


def write_recipe(folder: Path, model: Path, steps: int) -> Path:
    """One stage of steps that take a moment. An engine takes half a node: three of them need both nodes."""
    recipes.write_data(folder)
    stage = {
        "kind": "rl",
        "select_best": False,
        "learner": recipes.learner(),
        "algorithm": {"name": "grpo"},
        "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
        "loop": {"steps": steps, "prompts_per_step": PROMPTS, "num_samples": SAMPLES, "checkpoint_every": 2},
    }
    document = recipes.base(folder, model, [stage])
    for key in ("ray", "run_dir"):
        del document[key]
    document["name"] = "quickstart"
    document["sampling"] = {"max_tokens": 48, "ignore_eos": True}
    document["roles"]["generation"]["resources"] = {"cpus": 1.0}
    return recipes.write_recipe(folder, document)


@pytest.fixture
def terminal(tmp_path: Path, tiny_model_dir: Path) -> Iterator[Terminal]:
    folder = Path(tempfile.mkdtemp(prefix="rg", dir="/tmp"))
    terminal = Terminal(folder, write_recipe(tmp_path, tiny_model_dir, FOREVER))
    try:
        yield terminal
    finally:
        terminal.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(ready: Callable[[], bool], what: str, told: Path) -> None:
    deadline = time.monotonic() + 600.0
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not happen:\n{told.read_text() if told.is_file() else ''}"
        time.sleep(0.2)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_guide_can_be_followed(terminal: Terminal, tmp_path: Path, tiny_model_dir: Path) -> None:
    run, told = terminal.storage / "runs" / "quickstart", Path()
    blocks = iter(commands())

    def until(words: str) -> str:
        """Runs the blocks up to the one with these words, and returns that."""
        while words not in (block := next(blocks)):
            terminal.run(block)
        return block

    def happened(kind: str, number: int) -> Callable[[], bool]:
        return lambda: recipes.has_event(run, kind) and len(_of_generation(run, kind)) >= number

    def steps_from_now(number: int) -> Callable[[], bool]:
        wanted = len(recipes.metrics(run)) + number
        return lambda: len(recipes.metrics(run)) >= wanted

    submitted = terminal.run(until("--no-wait"))
    assert "submitted" in submitted
    follower, told = terminal.follow(until("--follow"))
    wait_for(steps_from_now(2), "a step", told)
    status = terminal.run(until("--status"))
    assert "RUNNING" in status and "generation" in status and "2" in status

    terminal.run(until("generation=3"))
    wait_for(happened("replica_joined", 3), "scaling up", told)
    wait_for(steps_from_now(3), "a step with three", told)
    terminal.run(until("generation=1"))
    wait_for(happened("replica_left", 2), "scaling down", told)
    wait_for(steps_from_now(2), "a step with one", told)

    lost = terminal.titles_on_second_node()
    assert any("GenerationWorker" in title for title in lost), lost
    assert not any("LearnerWorker" in title or "RecorderWorker" in title for title in lost), lost
    terminal.run(until("52368"))
    wait_for(happened("replica_lost", 1), "the loss", told)
    wait_for(happened("replica_joined", 4), "the replacement", told)
    wait_for(steps_from_now(2), "a step after the loss", told)

    terminal.run(until("kill -KILL"))
    assert follower.wait(120) == 128 + signal.SIGKILL, told.read_text(encoding="utf-8")
    assert "stage rl" in told.read_text(encoding="utf-8")
    terminal.run(until("--no-wait"))
    wait_for(lambda: recipes.has_event(run, "stage_resumed"), "the next driver", told)
    wait_for(steps_from_now(2), "a step of the next driver", told)

    assert "STOPPED" in terminal.run(until("--cancel"))
    steps = len(recipes.metrics(run)) + STEPS_AFTER_CANCEL
    write_recipe(tmp_path, tiny_model_dir, steps)
    assert "has ended" in terminal.run(until("submit"))
    rest = "".join(terminal.run(block) for block in blocks)
    assert "complete" in rest and "replica_lost" in rest
    assert f"steps: {steps} of {steps} with [{PROMPTS}] prompts each" in rest
    assert "twice: 0\n" in rest and "step's: 0\n" in rest
    _check_record(run, steps)


def _of_generation(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in recipes.events(run, kind) if event["role"] == "generation"]


def _check_record(run: Path, steps: int) -> None:
    """Each prompt trained once, in its step, on completions of that step's weights; nothing else was lost."""
    assert [line["step"] for line in recipes.metrics(run)] == list(range(1, steps + 1))
    rows = recipes.table(run, "rollouts", "rl.step_*")
    assert Counter(Counter(row["uid"] for row in rows).values()) == {SAMPLES: steps * PROMPTS}
    assert Counter(row["step"] for row in rows) == dict.fromkeys(range(steps), PROMPTS * SAMPLES)
    assert all({span["version"] for span in row["version_spans"]} == {row["step"]} for row in rows)
    assert all(row["score"] is not None for row in rows)
    [loss] = recipes.events(run, "replica_lost")
    [replaced] = [event for event in _of_generation(run, "replica_joined") if "replaces" in event]
    assert replaced["replaces"] == loss["replica"] and loss["lost_steps"] == 0
    assert len(_of_generation(run, "replica_left")) == 2
    for kind in ("gang_lost", "scaling_failed", "item_poisoned", "prompts_dropped", "stage_failed"):
        assert recipes.events(run, kind) == []
    assert recipes.events(run, "driver_reattached")[0]["num_actors"] == 4, "recorder, engine, rules, learner"
    assert {event["role"] for event in recipes.events(run, "replica_adopted")} == {"generation", "recorder"}
    assert len(recipes.events(run, "gang_adopted")) == 1
    assert [event["signal"] for event in recipes.events(run, "stopped")] == ["SIGTERM"]
    resumed = [event["step"] for event in recipes.events(run, "stage_resumed")]
    assert len(resumed) == 2 and resumed[1] == steps - STEPS_AFTER_CANCEL
