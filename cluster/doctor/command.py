"""The command ``rlhf doctor``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.doctor.facts import Facts, gather_facts
from cluster.doctor.findings import Check, exit_code, print_checks
from cluster.doctor.machine import run_doctor
from rlhf.errors import ConfigError


def main(*, address: str | None = None, run_dir: Path | None = None, full: bool = False) -> int:
    """Prints the findings; 0 if none is an error, else 1.

    Args:
        address: A cluster to look at too; None takes ``RAY_ADDRESS``, if it is set.
        run_dir: Folder of the run storage that its nodes share.
        full: Whether to do one small run for real: minutes.

    Raises:
        ConfigError: The options do not go together.
    """
    facts = gather_facts()
    address = address or facts.environ.get("RAY_ADDRESS") or None
    folder = _folder(run_dir, address, full)
    checks = run_doctor(facts, joins=address is not None)
    if address is not None:
        checks += _cluster(address, folder)
    if full:
        checks += _trial(facts, address, folder)
    print_checks(checks)
    return exit_code(checks)


def _folder(run_dir: Path | None, address: str | None, full: bool) -> Path | None:
    if run_dir is None:
        if full and address is not None:
            raise ConfigError(
                "doctor --full",
                found=f"a cluster ({address}) and no --run-dir",
                needed="a folder that all its nodes share, for the files of a small run",
                action="Add --run-dir DIR.",
            )
        return None
    folder = run_dir.expanduser().resolve()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"--run-dir {run_dir}",
            found="no such folder, or no right to write there",
            needed="the folder that run directories are to be in",
            action="Create it, or name another one.",
        )
    return folder


def _cluster(address: str, folder: Path | None) -> list[Check]:
    print(f"asking the nodes of {address}; up to a minute or two", file=sys.stderr, flush=True)
    from cluster.doctor.survey import check_cluster

    return check_cluster(address, folder)


def _trial(facts: Facts, address: str | None, folder: Path | None) -> list[Check]:
    print("one small run: generation, update, publication; a few minutes", file=sys.stderr, flush=True)
    from cluster.doctor.trial import check_trial

    return check_trial(visible_gpus(facts), address, folder)


def visible_gpus(facts: Facts) -> int:
    """GPUs that a run here can use: none for a CPU build, else what ``CUDA_VISIBLE_DEVICES`` leaves of them."""
    if not facts.cuda:
        return 0
    named = facts.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return len(facts.gpus)
    return min(len(facts.gpus), len([name for name in named.split(",") if name.strip() not in ("", "-1")]))
