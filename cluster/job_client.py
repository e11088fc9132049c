"""Ray's job server, with deadlines and errors of ours."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.token import protect_token
from rlhf.errors import ClusterError, ConfigError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
"""Longest silence of the server in one answer, or while a package goes to it."""

_TAKES_PRECEDENCE = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_TALKATIVE = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
"""Modules of Ray that tell of every package and connection in a log of their own."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RunJobClient(JobSubmissionClient):
    """Ray's client, which has no deadlines of its own: its requests wait for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S), **options)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """The log from its beginning; raises ``OSError`` or ``RuntimeError`` where the connection is lost."""
        try:
            async for text in super().tail_job_logs(job_id):
                yield text
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error


def connect_jobs(address: str) -> RunJobClient:
    """A client of the job server at ``address``, which has answered.

    Ray's token goes along where ``RAY_AUTH_MODE=token`` is set here, as for all of Ray's own clients. It is not sent
    unasked: it opens a cluster, and the address may be anybody's.

    Raises:
        ConfigError: No address of a job server.
        ClusterError: Nobody answers there, or not to this token.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(
            "--address",
            found=address.split("@")[-1],
            needed="the dashboard of the cluster's head, http://HOST:8265",
            action="Write it without user and password; Ray's token comes from the environment.",
        )
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        protect_token()
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            said = "the token goes over the network unencrypted; a tunnel to localhost or https keeps it secret"
            print(f"rlhf submit: {said}", file=sys.stderr)
    for name in _TALKATIVE:
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with _without(_TAKES_PRECEDENCE), job_errors(address):
        return RunJobClient(address)


@contextlib.contextmanager
def job_errors(address: str) -> Iterator[None]:
    """Turns what goes wrong between here and the job server into ``ClusterError``."""
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address}",
            found=str(error).split("\n")[0],
            needed="its token",
            action="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file, of mode 600, that holds the token.",
        ) from None
    except (RuntimeError, OSError, ValueError) as error:  # what Ray and the HTTP libraries below it raise
        raise ClusterError(
            f"the cluster at {address}",
            found=f"{type(error).__name__}: {(str(error).strip() or 'no word of why').splitlines()[0][:300]}",
            needed="a Ray job server that answers there",
            action="Check the address, that the head runs (`ray status` there), and the tunnel to it.",
        ) from error


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Hides variables for a moment: Ray would go to their cluster instead of the one that was asked for."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
