"""GPUs by name, for clusters that are not there yet, and what this machine has."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of GPU.

    Attributes:
        name: As the catalogue or the driver calls it.
        memory_gib: What a program can have of its memory, GiB.
        peak_tflops: Dense bf16 products, 10^12 operations a second, from the maker's data sheet.
        bandwidth_gbs: Memory bandwidth, 10^9 bytes a second, from the same.
    """

    name: str
    memory_gib: float
    peak_tflops: float
    bandwidth_gbs: float


CATALOGUE = {
    device.name: device
    for device in (
        Device("a100-80gb", 79.2, 312.0, 2039.0),
        Device("a100-40gb", 39.4, 312.0, 1555.0),
        Device("h100-80gb", 79.1, 989.0, 3350.0),
        Device("h200-141gb", 139.8, 989.0, 4800.0),
        Device("l40s-48gb", 44.4, 362.0, 864.0),
        Device("l4-24gb", 22.0, 121.0, 300.0),
        Device("rtx4090-24gb", 23.5, 165.0, 1008.0),
    )
}
"""Memory is what PyTorch reports as the device's total, which is less than the name says."""
DEFAULT = CATALOGUE["a100-80gb"]
"""Whose speed is taken for a device that is not in the catalogue."""


def local_device() -> Device | None:
    """The smallest GPU of this machine, with the speed of the catalogue's nearest name; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.rpartition(",") for line in done.stdout.splitlines()]
    found = [(float(memory), name.strip()) for name, _, memory in rows if memory.strip().isdigit()]
    if not found:
        return None
    mib, name = min(found)
    like = next((d for d in CATALOGUE.values() if d.name.partition("-")[0] in name.lower().replace(" ", "")), DEFAULT)
    # The driver's figure holds some hundred MiB that no program gets.
    return Device(name, mib / 1024 - 0.6, like.peak_tflops, like.bandwidth_gbs)


def host_memory_gib() -> float | None:
    """This machine's memory, or its container's limit, GiB; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration, ValueError):
        return None
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name)
        text = limit.read_text(encoding="ascii").strip() if limit.is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total / GIB
