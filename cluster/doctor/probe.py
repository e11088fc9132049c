"""What is looked at on a machine, here or on a node of a cluster; plain values only.

Standard library and psutil alone: a node is sent this module's code, as it need not have this package, or may have
another version of it.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster.token import token_file

RAY_PORTS = {6379: "GCS", 8265: "dashboard", 10001: "client", 8000: "serve"}
"""The ports that Ray takes unless told otherwise, and what for."""

CORE_PROCESSES = ("gcs_server", "raylet")
"""Ray's own processes on every node. They keep the environment that they were started with."""

PROBE_FILE = ".rlhf-doctor-"
"""How the names of the files begin that tell whether storage is shared."""


def list_gpus() -> tuple[str, ...]:
    """The machine's NVIDIA GPUs as ``nvidia-smi`` names them; none where there is no such command."""
    lines = _nvidia_smi("-L")
    return tuple(line.split(" (UUID")[0] for line in lines if line.startswith("GPU "))


def gpu_driver() -> str:
    """Version of the NVIDIA driver, for example ``"580.65.06"``; empty without one."""
    return next(iter(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")), "").strip()


def _nvidia_smi(*arguments: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def memory_limit(total: int) -> int:
    """Bytes that this process's control group may use, or ``total`` where it has no limit."""
    return min([total, *(limit for limit, _ in _cgroups())])


def memory_available(available: int) -> int:
    """Bytes that can still be had: ``available`` on the machine, or less where a control group leaves less."""
    return max(0, min([available, *(limit - used for limit, used in _cgroups())]))


def _cgroups() -> list[tuple[int, int]]:
    """Limit and use of each control group with a memory limit that this process is in, in bytes."""
    found = []
    for folder in _cgroup_folders():
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            texts = [_text(folder / limit), _text(folder / used)]
            if all(text.isdigit() for text in texts):
                cache = _counter(_text(folder / "memory.stat"), ("inactive_file", "total_inactive_file"))
                found.append((int(texts[0]), max(0, int(texts[1]) - cache)))
    return found


def _cgroup_folders(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The folders of this process's control group and all above it, version 2 and the memory part of version 1."""
    folders = [root, root / "memory"]
    for line in _text(own).splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        top = root if not controllers else root / "memory" if "memory" in controllers.split(",") else None
        parts = [part for part in path.split("/") if part and part != ".."]
        if top is not None:
            folders += [top.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _counter(text: str, names: Iterable[str]) -> int:
    values = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    return next((int(values[name]) for name in names if values.get(name, "").isdigit()), 0)


def listeners() -> list[dict[str, Any]]:
    """Who listens on Ray's usual ports, and where Ray's own processes listen.

    Returns:
        Port, address, process id (None of another user's), title, whether it is Ray's, and whether Ray asks it for a
        token: None where that cannot be seen.
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        name, title, variables = _process(connection.pid)
        port, address = connection.laddr.port, connection.laddr.ip
        core = name in CORE_PROCESSES
        if core or port in RAY_PORTS:
            mode = variables.get("RAY_AUTH_MODE", "").lower()
            found[port, address] = {
                "port": port,
                "address": address,
                "pid": connection.pid,
                "title": title or name or "another user's process",
                "is_ray": core or _is_ray(title),
                "asks_token": True if mode == "token" else False if core and variables else None,
            }
    _fill_in(found.values())
    return [found[key] for key in sorted(found)]


def _fill_in(found: Iterable[dict[str, Any]]) -> None:
    """Ray's Python processes rename themselves, which spoils their environment: they are as the core ones here are."""
    known = {one["asks_token"] for one in found} - {None}
    for one in found:
        if one["is_ray"] and one["asks_token"] is None and len(known) == 1:
            one["asks_token"] = next(iter(known))


def _process(pid: int | None) -> tuple[str, str, Mapping[str, str]]:
    """Name, title and environment; empty where they may not be seen."""
    try:
        process = psutil.Process(pid) if pid is not None else None
        name = process.name() if process else ""
        title = " ".join(process.cmdline()) if process else ""
    except psutil.Error:
        return "", "", {}
    try:
        return name, title, process.environ() if process else {}
    except psutil.Error:
        return name, title, {}


def _is_ray(title: str) -> bool:
    return title.startswith(("ray::", "ray-")) or "/ray/" in title or "ray.util.client.server" in title


def is_exposed(address: str) -> bool:
    """Whether other machines can reach what listens on this address."""
    try:
        return not ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return True


def token() -> dict[str, Any] | None:
    """Where Ray would find its token, and who may read it; None where there is none.

    The token itself is not read. ``mode`` and ``owner`` are None for one in the environment.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return {"path": "RAY_AUTH_TOKEN", "mode": None, "owner": None, "size": len(value)}
    path = token_file()
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    if path is None or found is None:
        return None
    return {"path": str(path), "mode": found.st_mode & 0o777, "owner": found.st_uid, "size": found.st_size}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def temporary_folder() -> str:
    """Where Ray keeps its sessions."""
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()


def shared_memory_free() -> int:
    """Bytes free in ``/dev/shm``; 0 where there is none."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0


class NodeProbe:
    """An actor that looks at the node it is on; every call takes a moment."""

    def facts(self, packages: Iterable[str]) -> dict[str, Any]:
        """What the doctor wants to know of a node; sizes in bytes."""
        memory = psutil.virtual_memory()
        usage = shutil.disk_usage(temporary_folder())
        return {
            "host": socket.gethostname(),
            "user": os.geteuid(),
            "versions": versions(packages),
            "gpus": list_gpus(),
            "memory_total": memory_limit(memory.total),
            "memory_available": memory_available(memory.available),
            "shm_free": shared_memory_free(),
            "disk_free": usage.free,
            "disk_used": usage.used / usage.total,
            "auth_mode": os.environ.get("RAY_AUTH_MODE", ""),
            "token": token(),
            "listeners": listeners(),
        }

    def clock(self) -> float:
        """Seconds since the epoch, by the node's clock."""
        return time.time()

    def exchange(self, folder: str, name: str, expected: str, own: str) -> str:
        """Reads what the driver wrote into a folder and answers with a file beside it.

        Args:
            folder: Where.
            name: What the names of both files begin with.
            expected: What the driver wrote into ``NAME-driver``.
            own: The name's end, and the content, of the answer.

        Returns:
            What was wrong; empty if nothing.
        """
        if not Path(folder).is_dir():
            return "there is no such folder"
        try:
            found = Path(folder, f"{name}-driver").read_text(encoding="utf-8")
            Path(folder, f"{name}-{own}").write_text(own, encoding="utf-8")
        except OSError as error:
            return f"{error.strerror}: {error.filename}"
        return "" if found == expected else "what the driver wrote reads differently"

    def forget(self, folder: str, name: str, own: str) -> None:
        """Removes the node's answer, where it lies on a disk of the node's own."""
        Path(folder, f"{name}-{own}").unlink(missing_ok=True)
