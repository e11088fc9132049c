"""Names in a run directory: its own folders and tables, and what a stage may be called."""

from __future__ import annotations

import re

INPUTS = "inputs"
"""Folder of the files that came along with a submitted run; it may be there before the run is."""

RUN_FOLDERS = frozenset(
    {"checkpoints", "control", "eval", "groups", "policy", "rankings", "ray_train", "reward_model", "rollouts"}
    | {"stacks", "stages", "tensorboard", "verdicts", INPUTS}
)
"""Folders of every run; a stage that trains a policy has one more, under its own name."""

NOT_STAGES = frozenset({"start", "move"})
"""Headings of the timings beside the stages: seconds in which roles became ready (``start``), and in which their parts
went in and out of device memory (``move``). Both passed inside of stages."""

_STAGE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_\-]*$")


_PART = re.compile(r"^[A-Za-z0-9_\-]+$")


def step_part(step: int) -> str:
    """The part of a stage's tables that one step of the online loop leaves."""
    return f"step_{step:06d}"


def validation_part(num_updates: int) -> str:
    """The part that a validation leaves."""
    return f"validation_{num_updates:06d}"


def chunk_part(chunk: int) -> str:
    """The part that one chunk of the feedback stage leaves."""
    return f"chunk_{chunk:04d}"


def validation_stage(stage: str) -> str:
    """The name under which a stage's validations stand among the metrics."""
    return f"{stage}-validation"


def table_file(stage: str, part: str) -> str:
    """File name of one part of a stage's table: no stage writes what another one wrote.

    The dot is in no stage's name, so no two stages share a file.

    Raises:
        ValueError: Either is not a plain word.
    """
    if not is_stage_name(stage) or not _PART.match(part):
        raise ValueError(f"{stage!r} and {part!r} instead of plain words")
    return f"{stage}.{part}.parquet"


def is_stage_name(name: str) -> bool:
    """Whether a name is a plain word, as it becomes part of paths."""
    return _STAGE_NAME.match(name) is not None
