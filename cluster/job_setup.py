"""What a submitted job does on the cluster before its driver: looks for the judge's key, lays the recipe's files.

``python -m cluster.job_setup FOLDER``: the folder has the recipe and its files, see ``cluster.shipping``. It
does not join the cluster. Nodes on one machine share Ray's folder, and the first task on each of them unpacks the job's
working directory anew: the one in which the driver was still to start would be gone.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from cluster.config import RunConfig, load_run_config
from cluster.shipping import RECIPE, judge_key_variable
from rlhf.errors import ConfigError, RlhfError
from rlhf.runs.names import INPUTS


def set_up(folder: Path) -> None:
    """Checks the judge's key, and puts the recipe's files where all nodes find them.

    Raises:
        ConfigError: The key is not set on the cluster, or the run directory cannot be written.
    """
    config = load_run_config(folder / RECIPE)
    check_key(config)
    lay_inputs(folder / INPUTS, config.directory / INPUTS)


def check_key(config: RunConfig) -> None:
    """The judging service's key is in the environment of this node, and so, one hopes, of all others."""
    variable = judge_key_variable(config)
    if variable is not None and not os.environ.get(variable):
        raise ConfigError(
            "roles.judge.endpoint.api_key_variable",
            found=f"no environment variable {variable} on the cluster",
            needed=f"the key of {config.roles.judge.endpoint.base_url if config.roles.judge.endpoint else 'the judge'}",
            action="Set it where the nodes are started, before `ray start`; a submitted job takes no secrets along.",
        )


def lay_inputs(source: Path, target: Path) -> None:
    """Copies the recipe's files into the run directory; their folders are named by content, so one that is there stays.

    A folder appears whole or not at all.

    Raises:
        ConfigError: The run directory cannot be written.
    """
    try:
        for folder in sorted(source.iterdir()) if source.is_dir() else []:
            if not (target / folder.name).is_dir():
                target.mkdir(parents=True, exist_ok=True)
                _lay(folder, target / folder.name)
    except OSError as error:
        raise ConfigError(
            str(target),
            found=error.strerror or str(error),
            needed="a folder that the job can write",
            action="Choose another run_dir or mend the permissions.",
        ) from error


def _lay(folder: Path, place: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=place.parent))
    try:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        partial.chmod(0o755)
        if not place.is_dir():
            partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Returns the exit code of the job where its driver is not to start, else 0."""
    try:
        set_up(Path(arguments[0]))
    except RlhfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
