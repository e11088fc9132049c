"""Submitting, attaching, following and cancelling, against a job server in memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus

from cluster import job_client, jobs
from cluster.cli import build_parser
from cluster.job_client import connect_jobs
from cluster.jobs import Request, RunJobs, serve
from cluster.shipping import Shipment, prepare
from rlhf.errors import ClusterError, ConfigError
from tests.cluster.test_shipping import SHARED, write_recipe

ADDRESS = "http://localhost:8265"
RUN = PurePosixPath("/shared/runs/film")


@dataclass
class Job:
    """A job as Ray tells of it."""

    submission_id: str
    metadata: dict[str, str]
    entrypoint: str = ""
    runtime_env: dict[str, Any] = field(default_factory=dict)
    status: JobStatus = JobStatus.RUNNING
    driver_exit_code: int | None = None
    message: str = ""
    start_time: int | None = 0
    end_time: int | None = None


class JobServer:
    """Keeps jobs; a job ends when its log has been read, as ``ends`` says."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.ends: tuple[JobStatus, int | None, str] = (JobStatus.SUCCEEDED, 0, "")
        self.log = ["stage feedback\n", "stage reward\n"]
        self.cuts = 0
        self.refuses = False
        self.sent: list[set[str]] = []

    def submit_job(self, **arguments: Any) -> str:
        if self.refuses or arguments["submission_id"] in self.jobs:
            raise RuntimeError("Request failed with status code 500: already exists")
        folder = Path(arguments["runtime_env"]["working_dir"])
        self.sent.append({path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()})
        assert arguments.pop("entrypoint_num_cpus") == 0
        job = Job(**arguments)
        self.jobs[job.submission_id] = job
        return job.submission_id

    def stop_job(self, job_id: str) -> bool:
        self.jobs[job_id].status = JobStatus.STOPPED
        return True

    def get_job_info(self, job_id: str) -> Job:
        return self.jobs[job_id]

    def list_jobs(self) -> list[Any]:
        return [Job("", {}), Job("rlhf-film-other-1", {}), *self.jobs.values()]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for number, text in enumerate(self.log):
            if self.cuts and number == 1:
                self.cuts -= 1
                raise ConnectionError("cut")
            yield text
        job = self.jobs[job_id]
        job.status, job.driver_exit_code, job.message = self.ends


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_S", 0.05)


@pytest.fixture
def server() -> JobServer:
    return JobServer()


@pytest.fixture
def shipment(tmp_path: Path) -> Shipment:
    return prepare(write_recipe(tmp_path), SHARED, None)


def ask(server: JobServer, shipment: Shipment | None, mode: str = "follow") -> int:
    request = Request(Path("my.yaml"), SHARED, ADDRESS, None, mode)  # type: ignore[arg-type]
    return serve(RunJobs(server, ADDRESS, RUN), request, shipment)


def test_a_run_is_sent_and_followed_to_its_end(server: JobServer, shipment: Shipment, capsys) -> None:
    assert ask(server, shipment) == 0
    [job] = server.jobs.values()
    assert job.submission_id.startswith("rlhf-film-") and job.submission_id.endswith("-1")
    assert "exec python -m cluster.cli run job/recipe.yaml ray.address=auto" in job.entrypoint
    assert job.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(jobs.STOP_GRACE_S)}
    assert job.metadata["rlhf_run_dir"] == str(RUN)
    [sent] = server.sent
    assert {"cluster/cli.py", "rlhf/config.py", "actors/fleet.py", "job/recipe.yaml"} <= sent
    out = capsys.readouterr().out
    assert out.count("stage feedback") == out.count("stage reward") == 1


def test_nothing_of_the_environment_goes_along(server: JobServer, shipment: Shipment, monkeypatch) -> None:
    monkeypatch.setenv("RLHF_JUDGE_API_KEY", "sk-very-secret-0123456789")
    ask(server, shipment)
    assert "very-secret" not in repr(server.jobs)


def test_the_same_command_again_attaches_and_then_resumes(server: JobServer, shipment: Shipment, capsys) -> None:
    assert ask(server, shipment, "no-wait") == 0
    assert len(server.jobs) == 1
    assert ask(server, shipment) == 0
    assert len(server.jobs) == 1 and "under way" in capsys.readouterr().out
    server.ends = (JobStatus.FAILED, 1, "")
    assert ask(server, shipment) == 1
    assert [job_id[-2:] for job_id in server.jobs] == ["-1", "-2"]


def test_a_job_with_another_recipe_is_not_attached_to(server: JobServer, shipment: Shipment, tmp_path: Path) -> None:
    ask(server, shipment, "no-wait")
    other = prepare(tmp_path / "recipe.yaml", [*SHARED, "seed=8"], None)
    with pytest.raises(ConfigError, match="another recipe"):
        ask(server, other)
    assert len(server.jobs) == 1


def test_whoever_submits_at_the_same_moment_attaches_to_the_winner(server: JobServer, shipment: Shipment) -> None:
    class Rival(JobServer):
        def submit_job(self, **arguments: Any) -> str:
            super().submit_job(**arguments)
            raise RuntimeError("already exists")

    rival = Rival()
    assert ask(rival, shipment) == 0
    assert len(rival.jobs) == 1
    server.refuses = True
    with pytest.raises(ClusterError, match="already exists"):
        ask(server, shipment)


def test_a_cut_connection_shows_every_line_once(server: JobServer, shipment: Shipment, capsys) -> None:
    server.cuts = 3
    assert ask(server, shipment) == 0
    out = capsys.readouterr().out
    assert out.count("stage feedback") == out.count("stage reward") == 1


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ((JobStatus.SUCCEEDED, 0, ""), 0),
        ((JobStatus.FAILED, 2, "config"), 2),
        ((JobStatus.FAILED, 143, ""), 143),
        ((JobStatus.FAILED, -9, ""), 137),
        ((JobStatus.STOPPED, None, ""), 143),
    ],
)
def test_the_exit_code_is_the_runs(server: JobServer, shipment: Shipment, ends: Any, code: int, capsys) -> None:
    server.ends = ends
    assert ask(server, shipment) == code
    assert (f"exit code {code};" in capsys.readouterr().err) == (str(ends[0]) == "FAILED"), "the same number is said"


def test_a_job_without_an_end_of_its_driver_is_the_clusters_fault(server: JobServer, shipment: Shipment) -> None:
    server.ends = (JobStatus.FAILED, None, "\nJob supervisor actor died: node lost\nmore")
    with pytest.raises(ClusterError, match="node lost") as caught:
        ask(server, shipment)
    assert caught.value.exit_code == 3 and "submit the run again" in caught.value.action


def test_a_server_that_is_gone_for_long_ends_the_following(server: JobServer, shipment: Shipment, monkeypatch) -> None:
    def gone(_: str) -> Job:
        raise ConnectionError("refused")

    ask(server, shipment, "no-wait")
    server.log = []
    monkeypatch.setattr(server, "get_job_info", gone)
    monkeypatch.setattr(jobs, "LOST_CONTACT_S", 0.2)
    with pytest.raises(ClusterError, match="may go on"):
        ask(server, None, "attach")


def test_ctrl_c_leaves_the_job_and_says_more(server: JobServer, shipment: Shipment, monkeypatch, capsys) -> None:
    def interrupted(_: RunJobs, __: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunJobs, "follow", interrupted)
    assert ask(server, shipment) == 130
    [job] = server.jobs.values()
    assert job.status == JobStatus.RUNNING
    said = capsys.readouterr().err
    for flag in ("--follow", "--cancel"):
        [line] = [line for line in said.splitlines() if flag in line]
        parsed = build_parser().parse_args(line.split("rlhf ", 1)[1].split())
        assert (parsed.command, parsed.address, parsed.overrides) == ("submit", ADDRESS, SHARED)


def test_cancel_and_status(server: JobServer, shipment: Shipment, capsys) -> None:
    assert ask(server, None, "status") == 0
    assert "no job of /shared/runs/film" in capsys.readouterr().out
    with pytest.raises(ClusterError, match="no job of"):
        ask(server, None, "cancel")
    ask(server, shipment, "no-wait")
    assert ask(server, None, "cancel") == 0
    assert [job.status for job in server.jobs.values()] == [JobStatus.STOPPED]
    assert ask(server, None, "cancel") == 0, "it is not at work any more"
    capsys.readouterr()
    ask(server, None, "status")
    assert "-1  STOPPED" in capsys.readouterr().out


def test_runs_of_other_directories_are_others(server: JobServer, shipment: Shipment) -> None:
    ask(server, shipment, "no-wait")
    other = RunJobs(server, ADDRESS, PurePosixPath("/shared/more/film"))
    assert other.attempts() == [], "the same name elsewhere"


# The real client, against a server that speaks a little of Ray's protocol


@pytest.fixture
def http() -> Iterator[tuple[str, list[dict[str, str]], list[int]]]:
    """Address, the headers of each request, and the status to answer with."""
    seen: list[dict[str, str]] = []
    answer = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            body = json.dumps(
                {"ray_version": ray.__version__, "version": "4"} if "version" in self.path else []
            ).encode()
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen, answer
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_the_token_is_refused_in_words(http: tuple[str, list[dict[str, str]], list[int]]) -> None:
    address, _, answer = http
    answer[0] = 401
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH") as caught:
        connect_jobs(address)
    assert caught.value.exit_code == 3


def test_the_environment_does_not_name_another_cluster(http, monkeypatch: pytest.MonkeyPatch) -> None:
    address, seen, _ = http
    monkeypatch.setenv("RAY_ADDRESS", "10.255.255.1:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.255.255.1:8265")
    assert connect_jobs(address).list_jobs() == []
    assert seen and os.environ["RAY_ADDRESS"] == "10.255.255.1:6379"


def test_a_server_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing; Ray's own client would wait for ever."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(job_client, "ANSWER_TIMEOUT_S", 0.2)
        with pytest.raises(ClusterError, match="Timeout|timed out"):
            connect_jobs(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("address", ["localhost:8265", "ray://h:10001", "auto", "http://user:pw@h:8265", ""])
def test_what_is_no_job_server_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:8265") as caught:
        connect_jobs(address)
    assert "pw" not in str(caught.value)
