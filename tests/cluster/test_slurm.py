"""The batch script for Slurm, with programs that only write down what they are asked."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "manifests" / "slurm.sbatch"

PROGRAMS = {
    "scontrol": 'case $1 in show) printf "n1\\nn2\\nn3\\n" ;; esac',
    # Of a step only what it would start is run: the head and the workers of Ray stay until they are ended.
    "srun": """
case "$*" in
  *hostname*) echo "10.0.0.1 172.17.0.1" ;;
  *) trap 'say ended; exit 0' TERM; say up; while :; do sleep 0.05; done ;;
esac""",
    "python": """
case "$1" in -c) echo -n 0123456789abcdef ;; esac
case "$*" in *"cluster.nodes wait"*)
  until (($(grep -c '^srun up$' "$CALLS") == 2)); do sleep 0.05; done
  exit "${NODES_CODE:-0}" ;;
esac""",
    "rlhf": """
say token "$(stat -c %a "$RAY_AUTH_TOKEN_PATH") $RAY_AUTH_MODE $RAY_ADDRESS"
if [[ -n ${RUN_LASTS:-} ]]; then
  trap 'say saved; exit 143' TERM
  while :; do sleep 0.05; done
fi
exit "${RUN_CODE:-0}" """,
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a batch script, with our programs before all others."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for name, body in PROGRAMS.items():
        say = f'say() {{ echo "{name} $*" >>"{tmp_path}/calls"; }}'
        program = folder / name
        program.write_text(f'#!/bin/bash\n{say}\nsay "$@"\n{body}\n', encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "home").mkdir()
    yield {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "RLHF_ENV": str(tmp_path / "env"),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "16",
        **{name: value for name, value in os.environ.items() if name.startswith("RLHF_TEST")},
    }


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def run(job: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=job, capture_output=True, text=True, timeout=120)


@contextlib.contextmanager
def running(job: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The script with a run that lasts until it is ended, and has begun."""
    command = ["bash", str(SCRIPT), "my.yaml"]
    script = subprocess.Popen(command, env=job | {"RUN_LASTS": "1"}, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not any(line.startswith("rlhf token") for line in calls(tmp_path)):
            assert script.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield script
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait(60)


def test_the_script_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, timeout=30).returncode == 0


def test_head_workers_and_driver_are_started_in_turn(job: dict[str, str], tmp_path: Path) -> None:
    done = run(job, "my.yaml", "run_dir=/shared/runs/my", "seed=2")
    assert done.returncode == 0, done.stderr
    said = calls(tmp_path)
    [head] = [line for line in said if "ray start --head" in line]
    assert "--nodelist=n1" in head and "--node-ip-address=10.0.0.1" in head
    assert "--dashboard-host=127.0.0.1" in head and "--block" in head
    [workers] = [line for line in said if "cluster.nodes join" in line]
    assert "--nodes=2 --ntasks=2 --exclude=n1" in workers and "join 10.0.0.1:6379" in workers
    wait = next(number for number, line in enumerate(said) if "cluster.nodes wait 3" in line)
    driver = said.index("rlhf run my.yaml ray.address=auto run_dir=/shared/runs/my seed=2")
    assert wait < driver
    assert said.count("srun ended") == 2, "no step is left"
    assert not any("requeue" in line for line in said)


def test_the_token_is_for_this_user_and_this_job_alone(job: dict[str, str], tmp_path: Path) -> None:
    done = run(job, "my.yaml")
    said = calls(tmp_path)
    assert "rlhf token 600 token 10.0.0.1:6379" in said
    assert not any("0123456789abcdef" in line for line in [*said, done.stdout, done.stderr])
    folder = tmp_path / "home" / ".rlhf"
    assert list(folder.iterdir()) == [], "it goes with the job"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_before_the_time_is_over_the_run_saves_and_goes_back_to_the_queue(job: dict[str, str], tmp_path: Path) -> None:
    with running(job, tmp_path) as script:
        os.kill(script.pid, signal.SIGUSR1)
        assert script.wait(60) == 143
    said = calls(tmp_path)
    saved, requeued = said.index("rlhf saved"), said.index("scontrol requeue 42")
    assert saved < requeued
    assert said.index("srun ended") > saved, "Ray lives while the run saves"


def test_a_cancelled_job_saves_and_stays_out_of_the_queue(job: dict[str, str], tmp_path: Path) -> None:
    with running(job, tmp_path) as script:
        os.kill(script.pid, signal.SIGTERM)
        assert script.wait(60) == 143
    said = calls(tmp_path)
    assert "rlhf saved" in said and not any("requeue" in line for line in said)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_the_jobs_exit_code_is_the_runs(job: dict[str, str], tmp_path: Path, code: int) -> None:
    assert run(job | {"RUN_CODE": str(code)}, "my.yaml").returncode == code
    assert not any("requeue" in line for line in calls(tmp_path))


def test_nodes_that_do_not_come_end_the_job(job: dict[str, str], tmp_path: Path) -> None:
    assert run(job | {"NODES_CODE": "3"}, "my.yaml").returncode == 3
    said = calls(tmp_path)
    assert not any(line.startswith("rlhf") for line in said)
    assert said.count("srun ended") == 2


def test_without_a_recipe_nothing_starts(job: dict[str, str], tmp_path: Path) -> None:
    done = run(job)
    assert done.returncode == 2 and "usage" in done.stderr
    assert calls(tmp_path) == []


def test_slurm_warns_the_script_alone_and_in_time() -> None:
    lines = [line.split(maxsplit=1)[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--signal=B:USR1@600" in lines and "--requeue" in lines


def test_joining_waits_for_the_head_and_gives_up_with_a_reason(capsys) -> None:
    from cluster import nodes

    assert nodes.main(["join", "127.0.0.1:1", "--timeout", "0.2"]) == 3
    assert "no answer in" in capsys.readouterr().err


def test_waiting_for_a_head_that_is_not_there_ends(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from cluster import nodes

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert nodes.main(["wait", "2", "--timeout", "0.2"]) == 3
    assert "the head at 127.0.0.1:1" in capsys.readouterr().err


def test_joining_becomes_ray_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from cluster import nodes

    become: list[list[str]] = []
    monkeypatch.setattr(nodes.os, "execvp", lambda _, words: become.append(words))
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        nodes.main(["join", address])
    assert become == [["ray", "start", f"--address={address}", "--block"]]
    assert sys.modules["cluster.nodes"] is nodes


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")
def test_every_option_of_ray_start_that_is_named_exists() -> None:
    """In the script, the manifests' head, and the guide."""
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    named = set()
    for text in (SCRIPT.read_text(encoding="utf-8"), guide):
        for line in re.sub(r"\\\n", " ", text).splitlines():
            if "ray start --" in line:
                named |= set(re.findall(r"--[a-z][a-z-]+", line.split("ray start", 1)[1].split("`")[0]))
    assert {"--head", "--address", "--dashboard-host"} <= named
    assert named <= known | {"--block"}
