"""The engine's processes: on which cores they run, what they find in their environment, and that they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from actors.vllm.watchdog import OWNER_VARIABLE


@dataclass(frozen=True, slots=True)
class Cores:
    """What an engine may use of a CPU.

    Attributes:
        threads: Threads that compute; None uses as many as there are cores.
        ids: Cores to stay on; empty leaves the choice to the operating system.
    """

    threads: int | None = None
    ids: tuple[int, ...] = ()

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return self.threads or len(self.ids) or len(os.sched_getaffinity(0))


def engine_environment(cores: Cores, start_timeout_s: float) -> dict[str, str]:
    """Returns the variables that the engine's processes have to find when they start."""
    variables = {
        OWNER_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": str(cores.num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM's own choice leaves a core idle
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(start_timeout_s) + 1),
        # Processes made by fork would share the owner's threads and sockets.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if cores.ids:
        variables["GOMP_CPU_AFFINITY"] = " ".join(map(str, cores.ids))
    return variables


@contextmanager
def restored_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for a while; whatever else was changed meanwhile (vLLM preloads libraries) is undone too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def descendants() -> set[int]:
    """Ids of all processes below this one, but for Python's own resource tracker, which ends with this process."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any("resource_tracker" in argument for argument in child.cmdline()):
                found.add(child.pid)
    return found


async def end_processes(pids: Iterable[int], timeout_s: float) -> None:
    """Kills processes that are still there and waits until they are gone, at most ``timeout_s`` seconds."""
    left = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(pid))
    _, left = await asyncio.to_thread(psutil.wait_procs, left, 1.0)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    await asyncio.to_thread(psutil.wait_procs, left, timeout_s)
