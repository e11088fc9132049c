"""The set-up script's decisions: which packages, from where, what is missing, what must be mended."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import setup_env
from setup_env import SetupError, Sources, choose_device, damaged_packages, parse_pip_config, source_choices

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("asked", "gpu_list", "has_driver", "device", "reason"),
    [
        ("", "", False, "cpu", "no NVIDIA GPU"),
        ("", "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n", True, "cuda", "2 GPU"),
        ("", "", True, "cuda", "/dev/nvidia0"),
        ("cpu", "GPU 0: NVIDIA H100 (UUID: GPU-1)", True, "cpu", "RLHF_DEVICE=cpu"),
        ("cuda", "", False, "cuda", "RLHF_DEVICE=cuda"),
    ],
)
def test_the_device_is_chosen_with_a_reason(asked, gpu_list, has_driver, device, reason):
    chosen, why = choose_device(asked, gpu_list, has_driver)
    assert chosen == device
    assert reason in why


def test_an_unknown_device_is_refused():
    with pytest.raises(SetupError, match="cpu or cuda"):
        choose_device("gpu", "", False)


def test_pip_settings_are_read_and_the_environment_wins():
    text = """global.extra-index-url='https://a.example/simple https://b.example/simple'
global.find-links='/old'
:env:.find-links='/wheels /more'
global.index-url='https://mirror.example/simple'
:env:.no-index='0'
list.format='json'
"""
    assert parse_pip_config(text) == Sources(
        index_url="https://mirror.example/simple",
        extra_index_urls=("https://a.example/simple", "https://b.example/simple"),
        find_links=("/wheels", "/more"),
        certificate="",
        no_index=False,
    )


def test_configured_sources_come_first_and_the_pytorch_index_last():
    sources = Sources("https://m.example/simple", ("https://x.example/simple",), ("/wheels",), "", False)
    names = [arguments for _, arguments in source_choices(sources, "cpu")]
    assert names[0] == ["--default-index", "https://m.example/simple", "--find-links", "/wheels"]
    assert "unsafe-best-match" in names[1] and setup_env.PYTORCH_CPU_INDEX not in names[1]
    assert names[2][-1] == setup_env.PYTORCH_CPU_INDEX
    assert len(source_choices(sources, "cuda")) == 2


def test_no_index_is_respected():
    sources = Sources("https://m.example/simple", ("https://x.example/simple",), ("/wheels",), "", True)
    assert source_choices(sources, "cpu") == [("the configured sources", ["--no-index", "--find-links", "/wheels"])]


def test_a_half_installed_package_is_found(tmp_path):
    def package(name: str, files: list[str], *, record: bool = True) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        for file in files[:-1] if name == "torn" else files:
            (tmp_path / file).write_text("")
        if record:
            listed = [*files, f"{name}.pyc"]  # compiled files may be missing
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in listed))

    package("whole", ["whole.py"])
    package("torn", ["torn.py", "torn_more.py"])
    package("unrecorded", ["unrecorded.py"], record=False)
    assert damaged_packages(tmp_path) == ["torn", "unrecorded"]
    assert not (tmp_path / "unrecorded-1.0.dist-info").exists()


def test_packages_are_compiled_and_what_cannot_be_is_left(tmp_path, monkeypatch):
    site = tmp_path / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (site / "sound.py").write_text("answer = 42\n")
    (site / "template.py").write_text("answer = {{ answer }\n")
    monkeypatch.setattr(setup_env, "VENV", tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # where nothing else would compile them, it matters most
    setup_env.compile_packages()
    assert [Path(file).name.split(".")[0] for file in site.rglob("*.pyc")] == ["sound"]


def test_everything_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(setup_env, "free_gib", lambda path: 1.5)
    with pytest.raises(SetupError) as error:
        setup_env.check_machine("cpu", str(tmp_path), installed=False)
    for part in ("no-such-compiler", "Python.h", "1.5 GiB free", "apt-get install"):
        assert part in str(error.value)


def test_no_fitting_python_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setenv("RLHF_PYTHON", "/no/such/python")
    with pytest.raises(SetupError, match="apt-get install python3.11"):
        setup_env.find_python()


def test_this_python_is_found(monkeypatch):
    monkeypatch.delenv("RLHF_PYTHON", raising=False)
    path, version, include = setup_env.find_python()
    assert version in setup_env.PYTHONS
    assert Path(path).exists() and (Path(include) / "Python.h").is_file()


def test_the_key_changes_with_what_would_be_installed(monkeypatch):
    key = setup_env.setup_key("cpu", (3, 11))
    assert key == setup_env.setup_key("cpu", (3, 11))
    assert len({key, setup_env.setup_key("cuda", (3, 11)), setup_env.setup_key("cpu", (3, 12))}) == 3


def pins(device: str) -> dict[str, str]:
    lines = (ROOT / f"constraints-{device}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_direct_dependency_is_pinned(device):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras[device] + extras["quickstart"] + extras["dev"]
    names = {re.split(r"[\[<>=]", item)[0].lower() for item in wanted}
    assert names <= set(pins(device)), names - set(pins(device))


def test_cpu_pins_leave_out_what_breaks_cpu_torch():
    assert not set(setup_env.CUDA_ONLY) & set(pins("cpu"))
    assert pins("cpu")["torch"].endswith("+cpu")
    assert "+cpu" not in pins("cuda")["torch"]


def test_the_script_runs_on_an_old_python_far_enough_to_explain():
    tree = ast.parse((ROOT / "setup_env.py").read_text(), feature_version=(3, 7))  # a SyntaxError where it is too new
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
