"""``rlhf submit``: a run as a Ray job. One run directory has one job at a time; each further one resumes the run."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from cluster.config import read_run_config
from cluster.shipping import JOB_FOLDER, RECIPE, Shipment, judge_key_variable, pack, prepare, run_directory
from rlhf.errors import ClusterError, ConfigError

Mode = Literal["follow", "no-wait", "attach", "status", "cancel"]
"""``follow`` starts or attaches and follows to the end, ``no-wait`` only starts, ``attach`` only follows."""

STOP_GRACE_S = 600
"""What a job that is cancelled gets for finishing its step and saving; Ray's own default is 3 seconds."""

POLL_S = 5.0
"""Between two looks at the status of a job."""

LOST_CONTACT_S = 300.0
"""How long the job server may be out of reach while a job is followed: a head that restarts is back within that."""

STOPPED_EXIT_CODE = 143


class JobClient(Protocol):
    """What is asked of Ray's job server; see ``ray.job_submission.JobSubmissionClient``."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
        entrypoint_num_cpus: int,
    ) -> str:
        """Starts a job and returns its id."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """Asks a job to end; whether it was running."""
        ...

    def get_job_info(self, job_id: str) -> Any:
        """Status and exit code of a job."""
        ...

    def list_jobs(self) -> list[Any]:
        """All jobs that the cluster remembers."""
        ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """The log of a job from its beginning, until the job ends."""
        ...


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        config: The recipe.
        overrides: ``key=value`` items.
        address: Of the job server.
        storage: From where a relative ``run_dir`` counts on the cluster.
        mode: What to do.
    """

    config: Path
    overrides: Sequence[str]
    address: str
    storage: Path | None
    mode: Mode

    def again(self, flag: str) -> str:
        """The command that does something else with the same run."""
        storage = [] if self.storage is None else ["--storage", str(self.storage)]
        words = ["rlhf", "submit", str(self.config), *self.overrides, "--address", self.address, *storage]
        return shlex.join([*words, flag] if flag else words)


def submit(request: Request) -> int:
    """Does what was asked and returns the exit code: the run's own where its end was waited for.

    Raises:
        ConfigError: The recipe cannot be sent, or another one is running in its directory.
        ClusterError: The cluster cannot be reached, there is no such job, or the job ended without its driver.
    """
    shipment = None
    if request.mode in ("follow", "no-wait"):
        shipment = prepare(request.config, request.overrides, request.storage)
        run_dir = shipment.run_dir
    else:
        run_dir = run_directory(read_run_config(request.config, request.overrides), request.storage)

    from cluster.job_client import connect_jobs

    return serve(RunJobs(connect_jobs(request.address), request.address, run_dir), request, shipment)


def serve(jobs: RunJobs, request: Request, shipment: Shipment | None) -> int:
    """``submit`` with a client that is connected; ``shipment`` is what is started where nothing runs yet."""
    if request.mode == "status":
        return jobs.print_status()
    if request.mode == "cancel":
        return jobs.cancel()
    job_id = jobs.start_or_attach(shipment) if shipment is not None else jobs.last_id()
    if request.mode == "no-wait":
        print(f"follow it with: {request.again('--follow')}")
        return 0
    try:
        return jobs.end_of(asyncio.run(jobs.follow(job_id)))
    except KeyboardInterrupt:
        print(
            f"\n{job_id} goes on. Follow it with: {request.again('--follow')}\n"
            f"End it with: {request.again('--cancel')}",
            file=sys.stderr,
        )
        return 130


class RunJobs:
    """The jobs of one run directory on one cluster.

    Their ids follow from the run directory, so that anybody who names it finds them: ``rlhf-NAME-DIGEST-ATTEMPT``.

    Args:
        client: Of the job server.
        address: Its address, for errors.
        run_dir: The run directory on the cluster.
    """

    def __init__(self, client: JobClient, address: str, run_dir: PurePosixPath) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")[:40] or "run"
        self._client = client
        self._address = address
        self._run_dir = run_dir
        self._prefix = f"rlhf-{name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:10]}-"

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        from cluster.job_client import job_errors

        return job_errors(self._address)

    def attempts(self) -> list[Any]:
        """All jobs of the run that the cluster remembers, in the order of their attempts."""
        with self._errors():
            jobs = self._client.list_jobs()
        ours = [job for job in jobs if self._attempt_of(job.submission_id) is not None]
        return sorted(ours, key=lambda job: self._attempt_of(job.submission_id) or 0)

    def _attempt_of(self, job_id: str | None) -> int | None:
        rest = (job_id or "").removeprefix(self._prefix)
        return int(rest) if rest != job_id and rest.isdecimal() else None

    def last_id(self) -> str:
        """The newest job of the run; ``ClusterError`` where there is none."""
        attempts = self.attempts()
        if not attempts:
            raise ClusterError(
                f"the cluster at {self._address}",
                found=f"no job of {self._run_dir}",
                needed="one that was submitted",
                action="Submit the run without --follow or --cancel first, or check run_dir.",
            )
        job_id: str = attempts[-1].submission_id
        return job_id

    # Starting

    def start_or_attach(self, shipment: Shipment) -> str:
        """Starts the run's next attempt, or finds the one that is under way; returns its id."""
        attempts = self.attempts()
        if attempts and not attempts[-1].status.is_terminal():
            return self._attach(attempts[-1], shipment)
        number = 1 + (self._attempt_of(attempts[-1].submission_id) or 0 if attempts else 0)
        job_id = f"{self._prefix}{number}"
        try:
            self._start(job_id, shipment)
        except ClusterError:
            rivals = [job for job in self.attempts() if job.submission_id == job_id]
            if not rivals:
                raise
            return self._attach(rivals[0], shipment)  # somebody submitted the same run at the same moment
        variable = judge_key_variable(shipment.config)
        if variable is not None:
            print(f"the judge takes {variable} from the environment of the cluster's nodes; it is not sent")
        print(f"submitted {job_id}; the run is kept in {self._run_dir} on the cluster", flush=True)
        return job_id

    def _start(self, job_id: str, shipment: Shipment) -> None:
        with tempfile.TemporaryDirectory(prefix="rlhf-submit-") as folder:
            pack(shipment, Path(folder))
            environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}
            with self._errors():
                self._client.submit_job(
                    entrypoint=entrypoint(),
                    submission_id=job_id,
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata={"rlhf_run_dir": str(self._run_dir), "rlhf_recipe": shipment.digest},
                    entrypoint_num_cpus=0,
                )

    def _attach(self, job: Any, shipment: Shipment) -> str:
        if (job.metadata or {}).get("rlhf_recipe") != shipment.digest:
            raise ConfigError(
                str(self._run_dir),
                found=f"{job.submission_id} at work there with another recipe",
                needed="the same recipe and data, or nothing at work",
                action="Wait for it, end it with --cancel, or set another run_dir.",
            )
        job_id: str = job.submission_id
        print(f"{job_id} is under way; the run is kept in {self._run_dir} on the cluster", flush=True)
        return job_id

    # Following

    async def follow(self, job_id: str) -> Any:
        """Prints the log of a job until it has ended; returns its last status.

        Raises:
            ClusterError: The job server has been out of reach for ``LOST_CONTACT_S``.
        """
        log = _Log(self._client, job_id)
        last_answer = time.monotonic()
        while True:
            printing = asyncio.create_task(log.print_rest())
            details, ended = None, False
            try:
                while not (printing.done() or ended):
                    await asyncio.wait({printing}, timeout=POLL_S)
                    details = await self._ask(job_id, last_answer)
                    last_answer = time.monotonic() if details is not None else last_answer
                    ended = details is not None and details.status.is_terminal()
                if ended:
                    await asyncio.wait({printing}, timeout=POLL_S)  # for the last lines
                    return details
            finally:
                printing.cancel()
                await asyncio.gather(printing, return_exceptions=True)
            await asyncio.sleep(POLL_S / 5)

    async def _ask(self, job_id: str, last_answer: float) -> Any:
        """The status of a job; None where the server has not answered, which it need not for a while."""
        try:
            with self._errors():
                return await asyncio.to_thread(self._client.get_job_info, job_id)
        except ClusterError as error:
            if time.monotonic() - last_answer < LOST_CONTACT_S:
                return None
            raise ClusterError(
                error.where,
                found=f"no answer for {LOST_CONTACT_S:.0f} s ({error.found})",
                needed="the job server, to follow the job",
                action=f"{job_id} may go on without it. Run the same command again to find out.",
            ) from None

    def end_of(self, details: Any) -> int:
        """The exit code of a job that has ended, with a line that says how.

        Raises:
            ClusterError: It ended without its driver having ended: the node that ran it is gone, or it never started.
        """
        job_id, status = details.submission_id, str(details.status)
        if status == "SUCCEEDED":
            print(f"{job_id} has ended; the run is in {self._run_dir} on the cluster")
            return 0
        if status == "STOPPED":
            print(f"{job_id} was stopped; submit the run again to go on", file=sys.stderr)
            return STOPPED_EXIT_CODE
        code = details.driver_exit_code
        if code is None:
            said = [line for line in (details.message or "").splitlines() if line.strip()]
            raise ClusterError(
                job_id,
                found=f"no end of its driver ({said[0].strip()[:300] if said else 'no word of why'})",
                needed="a driver that runs to its end",
                action="If the head or its node was replaced, submit the run again to go on; else see Ray's log of it.",
            )
        print(f"{job_id} has failed with exit code {_as_in_a_shell(code)}; what was done is kept", file=sys.stderr)
        return _as_in_a_shell(code)

    # Status and cancelling

    def print_status(self) -> int:
        """Prints a line per attempt."""
        attempts = self.attempts()
        if not attempts:
            print(f"no job of {self._run_dir} at {self._address}")
        for job in attempts:
            times = f"{_clock(job.start_time)} to {_clock(job.end_time) if job.end_time else 'now'}"
            code = "" if job.driver_exit_code is None else f", exit code {_as_in_a_shell(job.driver_exit_code)}"
            print(f"{job.submission_id}  {job.status}  {times}{code}")
        return 0

    def cancel(self) -> int:
        """Asks the newest job to save and end, and waits until it has.

        Raises:
            ClusterError: There is no job, or it has not ended in time.
        """
        job_id = self.last_id()
        with self._errors():
            details = self._client.get_job_info(job_id)
            if details.status.is_terminal():
                print(f"{job_id} is not at work ({details.status})")
                return 0
            self._client.stop_job(job_id)
        print(f"{job_id} saves and ends; this may take as long as a step", flush=True)
        deadline = time.monotonic() + STOP_GRACE_S + 60.0
        while not details.status.is_terminal():
            if time.monotonic() > deadline:
                needed, action = "its end", "Look at the job's log and at the head with `ray status`."
                raise ClusterError(job_id, found=f"status {details.status}", needed=needed, action=action)
            time.sleep(POLL_S / 5)
            with self._errors():
                details = self._client.get_job_info(job_id)
        print(f"{job_id}: {details.status}; submit the run again to go on")
        return 0


class _Log:
    """What a job prints. Every connection begins at the beginning again, so it is counted what was shown."""

    def __init__(self, client: JobClient, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._shown = 0

    async def print_rest(self) -> None:
        """Prints what is new until the job ends or the connection does."""
        received = 0
        with contextlib.suppress(OSError, RuntimeError):  # a lost connection: the status says whether to try again
            async for text in self._client.tail_job_logs(self._job_id):
                new = text[max(0, self._shown - received) :]
                received += len(text)
                if new:
                    sys.stdout.write(new)
                    sys.stdout.flush()
                    self._shown = received


def entrypoint() -> str:
    """What the job runs in its working directory: its set-up, then the driver in the place of the shell.

    The signal of a job that is cancelled so reaches the driver, and the exit code of the job is the driver's.
    """
    setup = f"python -m cluster.job_setup {JOB_FOLDER}"
    return f"{setup} && exec python -m cluster.cli run {JOB_FOLDER}/{RECIPE} ray.address=auto"


def _as_in_a_shell(code: int) -> int:
    """An exit code of Ray's, which is a signal's negative number for a process that was killed."""
    return code if code >= 0 else 128 - code


def _clock(milliseconds: int | None) -> str:
    return "-" if milliseconds is None else time.strftime("%F %T", time.localtime(milliseconds / 1000))
