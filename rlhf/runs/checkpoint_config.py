"""Where the checkpoints of a run go, and how they are written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlhf.config import StrictModel

if TYPE_CHECKING:
    from rlhf.runs.directory import RunDirectory
    from rlhf.runs.storage import Storage

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://[^/]*/?.*$")


class CheckpointConfig(StrictModel):
    """Checkpoints of every stage that trains."""

    target: str | None = Field(default=None, min_length=1)
    """URL that takes them instead of the run directory, for example ``s3://bucket/runs/first``: any that fsspec and its
    packages know, which every rank can reach. It is this run's own. Credentials come from the environment and never
    stand in it."""
    in_background: bool | None = None
    """Copies the learner's state to host memory between two steps, and writes the copy while training goes on: 12
    bytes for each number that is trained, over all ranks. Unset: where the learners have GPUs. On CPUs the copy takes
    the memory that the state itself is in, and writing it the cores that train."""

    @field_validator("target")
    @classmethod
    def _is_a_plain_url(cls, target: str | None) -> str | None:
        if target is None:
            return None
        if not _SCHEME.match(target) or "::" in target:
            raise ValueError("a URL such as s3://bucket/path or file:///path")
        parts = urlsplit(target)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("a URL without user, password, keys or options: credentials come from the environment")
        if parts.scheme == "memory":
            raise ValueError("a storage that outlives the process which writes to it")
        if not parts.path.strip("/") and not parts.netloc:
            raise ValueError("a URL that names a folder")
        return target.rstrip("/")

    def place(self, run: RunDirectory, stage: str) -> str:
        """The folder or URL of one stage's checkpoints."""
        local = run.checkpoints(stage)
        return str(local) if self.target is None else f"{self.target}/{local.name}"

    def storage(self, run: RunDirectory, stage: str) -> Storage:
        """What holds one stage's checkpoints."""
        from rlhf.runs.storage import storage_at

        return storage_at(self.place(run, stage))

    def writes_in_background(self, *, on_gpus: bool) -> bool:
        """Whether learners on such devices write copies in the background."""
        return on_gpus if self.in_background is None else self.in_background
