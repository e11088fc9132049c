"""A run's claim on the storage of its checkpoints: two runs in one place would resume from each other's."""

from __future__ import annotations

import uuid
from pathlib import Path

from rlhf.errors import ConfigError
from rlhf.runs.checkpoint_config import CheckpointConfig
from rlhf.runs.directory import RunDirectory
from rlhf.runs.files import write_text
from rlhf.runs.storage import storage_at

OWNER = "RUN"
"""Names, in the storage and among the run's own checkpoints, whose they are."""

_KEY = "checkpoints.target"


def claim_target(config: CheckpointConfig, run: RunDirectory) -> None:
    """Makes the storage this run's own, or checks that it is; nothing happens where the run directory is the storage.

    Raises:
        ConfigError: It is another run's, has checkpoints of nobody knows whom, or cannot be reached. The directory of
            a new run is withdrawn.
    """
    if config.target is None:
        return
    own = run.root / "checkpoints" / OWNER
    try:
        _claim(config.target, own)
    except ConfigError:
        run.withdraw()  # what was refused can be mended and tried again in the same directory
        raise


def _claim(target: str, own: Path) -> None:
    try:
        storage = storage_at(target)
        owner = storage.read_pointer(OWNER)
        mine = own.read_text(encoding="utf-8") if own.is_file() else None
        if owner is None:
            mine = mine or f"{uuid.uuid4().hex}\n"
            storage.write_pointer(OWNER, mine)
            owner = storage.read_pointer(OWNER)
            write_text(own, mine)
    except (ImportError, ValueError) as error:  # no such protocol, or no package for it
        needed = "a protocol of fsspec whose package is installed"
        raise ConfigError(_KEY, found=str(error), needed=needed, action="Install it, or take another.") from error
    except OSError as error:
        raise ConfigError(
            _KEY,
            found=f"{target}: {error.strerror or error}",
            needed="a storage that can be read and written",
            action="Check the address, and the credentials in the environment.",
        ) from error
    if owner != mine:
        raise ConfigError(
            _KEY,
            found=f"the checkpoints of another run in {target}",
            needed="a place of this run's own",
            action=f"Set another target, or remove what is there. To go on with that run, use its run_dir ({own.name} "
            "in its checkpoints folder says whose they are).",
        )
