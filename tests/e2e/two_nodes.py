"""A Ray cluster of two nodes on this machine, started as users start one: ``ray start`` with a token, and its ports."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e import recipes

START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class TwoNodes:
    """A cluster and how to reach it.

    Attributes:
        dashboard: Address of its job server.
        gcs: Address of its head.
        environment: Of commands that know the token.
        folder: Ray's own files, the token, and the nodes' output.
    """

    dashboard: str
    gcs: str
    environment: dict[str, str]
    folder: Path

    def command(self, module: str, *arguments: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
        """Runs one of our modules to its end, as a user of the cluster."""
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=recipes.ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


def _ray_start(environment: dict[str, str], log: Path, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """One node: nothing of it may take a port that a second node on this machine wants."""
    agent, grpc, metrics, runtime = free_ports(4)
    own = [
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        f"--object-store-memory={100 * 2**20}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={runtime}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
        "--block",
    ]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *own]
    with log.open("ab") as output:
        return subprocess.Popen(ray, env=environment, stdout=output, stderr=output, start_new_session=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Starts head and worker, and ends both with all of their processes."""
    before = set(recipes.runtime_processes())
    folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # Ray's sockets lie below it, and their paths are short
    gcs, dashboard = free_ports(2)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in recipes.MARKS}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
    }
    without_address = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    head = ["--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    nodes = []
    try:
        nodes.append(_ray_start(without_address, folder / "head.log", [*head, f"--temp-dir={folder / 'ray'}"]))
        cluster = TwoNodes(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment, folder)
        _wait_for(folder, nodes[0], gcs)
        _wait_for(folder, nodes[0], dashboard)
        nodes.append(_ray_start(without_address, folder / "worker.log", [f"--address=127.0.0.1:{gcs}"]))
        done = cluster.command("cluster.nodes", "wait", "2", "--timeout", str(START_TIMEOUT_S))
        assert done.returncode == 0, done.stderr + _logs(folder)
        yield cluster
    finally:
        for node in reversed(nodes):
            with contextlib.suppress(ProcessLookupError):
                node.send_signal(signal.SIGTERM)
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(60)
        _end_rest(before)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(folder: Path, node: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        assert node.poll() is None and time.monotonic() < deadline, _logs(folder)
        time.sleep(0.2)


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.log"))


def _end_rest(before: set[int], timeout_s: float = 60.0) -> None:
    """Some of Ray's agents look for a head for a minute before they end."""
    deadline = time.monotonic() + timeout_s
    while left := set(recipes.runtime_processes()) - before:
        if time.monotonic() > deadline - timeout_s / 2:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)
