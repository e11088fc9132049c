"""Constitutions and groups for tests of judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf.types import Completion, GroupHandle, Message, Prompt, Rollout, RolloutGroup, VersionSpan

TEMPLATES = {
    "pointwise": "{principles}\n=== case ===\nReview [{fence}]: {completion} [{fence}]\nIs it good, yes or no? It is",
    "pairwise": (
        "=== case ===\nA [{fence}] {first} [{fence}]\nB [{fence}] {second} [{fence}]\nIs A better, yes or no? It is"
    ),
}


def write_constitution(folder: Path, mode: str = "pointwise", extra: str = "") -> Path:
    template = folder / f"{mode}_template.txt"
    template.write_text(TEMPLATES[mode], encoding="utf-8")
    file = folder / f"{mode}.yaml"
    file.write_text(
        "name: test\nprinciples: Praise is good.\n"
        f"mode: {mode}\ntemplate: {template.name}\n"
        'labels: {positive: " yes", negative: " no"}\n'
        "sign: {field: request, values: {enthusiastic: 1, scathing: -1}}\n" + extra,
        encoding="utf-8",
    )
    return file


def make_group(uid: str, texts: Sequence[str], request: str = "enthusiastic") -> GroupHandle:
    prompt = Prompt(uid, (Message("user", "Write a review."),), (5, 6, 7), {"request": request})
    token_ids = np.array([9, 10], dtype=np.int32)
    log_probs = np.array([-1.0, -2.0], dtype=np.float32)
    rollouts = tuple(Rollout(Completion(token_ids, log_probs, text, "stop", (VersionSpan(0, 0, 2),))) for text in texts)
    return GroupHandle(uid, RolloutGroup(prompt, rollouts), 3, (2,) * len(texts), (0, 0))
