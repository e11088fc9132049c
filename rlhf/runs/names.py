"""Names in a run directory: its own folders, and what a stage may be called."""

from __future__ import annotations

import re

RUN_FOLDERS = frozenset(
    {"checkpoints", "control", "eval", "groups", "policy", "rankings", "ray_train", "reward_model", "rollouts"}
    | {"stages", "tensorboard", "verdicts"}
)
"""Folders of every run; a stage that trains a policy has one more, under its own name."""

_STAGE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_\-]*$")


def is_stage_name(name: str) -> bool:
    """Whether a name is a plain word, as it becomes part of paths."""
    return _STAGE_NAME.match(name) is not None
