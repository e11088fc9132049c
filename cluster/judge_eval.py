"""``rlhf judge-eval``: how far the judge of a recipe agrees with labels given by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import RunConfig
from rlhf.data.formats import read_rows
from rlhf.errors import ConfigError, DataError
from rlhf.feedback.agreement import spearman
from rlhf.feedback.constitution import Constitution, load_constitution
from rlhf.types import Completion, GroupHandle, Message, Prompt, Rollout, RolloutGroup, VersionSpan

LABELS = {"positive": 1.0, "mixed": 0.0, "negative": -1.0}


def evaluate_judge(config: RunConfig, data: Path) -> int:
    """Judges every text of a JSONL file with ``text`` and ``label``, prints agreement, and returns 0."""
    from rlhf.models.resolve import resolve_model

    if config.constitutions.training is None:
        raise ConfigError(
            "constitutions.training", found="nothing", needed="a constitution", action="Name the judge's file."
        )
    rows = read_rows(str(data))
    labels = [_label(row) for row in rows]
    constitution = load_constitution(config.constitutions.training)
    model = resolve_model(config.roles.judge.model or config.model)
    margins = asyncio.run(_margins(config, constitution, model, [row.text("text") for row in rows]))
    _print(labels, margins, constitution.config.name)
    return 0


def _label(row: Any) -> float:
    label = row.text("label")
    if label not in LABELS:
        raise DataError(
            row.where, found=f"label {label!r}", needed=f"one of {', '.join(LABELS)}", action="Mend the row."
        )
    return LABELS[label]


async def _margins(config: RunConfig, constitution: Constitution, model: Path, texts: Sequence[str]) -> list[Any]:
    """Margins towards positive in the order of the texts, from one judge in this process; None where it has none."""
    from actors.judge import JudgeWorker
    from actors.store import LocalStore
    from actors.vllm.processes import Cores

    assert config.constitutions.training is not None, "checked by the caller"
    role = config.roles.judge
    fields, factor = _positive_request(constitution)
    worker = JudgeWorker(
        model,
        role.engine,
        {"training": config.constitutions.training},
        LocalStore(),
        seed=config.seed,
        cores=Cores(role.resources.threads),
    )
    await worker.start()
    try:
        groups = [_group(index, text, fields) for index, text in enumerate(texts)]
        verdicts = await worker.judge(groups, "training")
    finally:
        await worker.stop()
    return [None if given[0].value is None else given[0].value / factor for given in verdicts]


def _positive_request(constitution: Constitution) -> tuple[dict[str, str], float]:
    """Fields of a prompt for which a positive text is good, and the factor of its margin."""
    sign = constitution.config.sign
    if sign is None:
        return {}, 1.0
    value, factor = max(sign.values.items(), key=lambda item: item[1])
    return {sign.field: value}, factor


def _group(index: int, text: str, fields: Mapping[str, str]) -> GroupHandle:
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", (VersionSpan(0, 0, 1),))
    prompt = Prompt(f"label/{index}", (Message("user", ""),), (0,), fields)
    return GroupHandle(prompt.uid, RolloutGroup(prompt, (Rollout(completion),)), 1, (1,), (0, 0))


def _print(labels: Sequence[float], margins: Sequence[float | None], name: str) -> None:
    known = [(label, margin) for label, margin in zip(labels, margins, strict=True) if margin is not None]
    clear = [(label, margin) for label, margin in known if label]
    accuracy = sum((label > 0) == (margin > 0) for label, margin in clear) / len(clear)
    pairs = [(a[1] > b[1]) + 0.5 * (a[1] == b[1]) for a in clear for b in clear if a[0] > b[0]]
    print(f"constitution {name}: {len(known)} of {len(labels)} texts judged")
    print(f"accuracy at margin 0   {accuracy:.3f} on {len(clear)} clear texts")
    print(f"ordered pairs (AUC)    {sum(pairs) / len(pairs):.3f}")
    print(f"Spearman               {spearman(labels, margins)} (mixed counts as 0)")
    print(f"median margin          {float(np.median([margin for _, margin in known])):+.3f} nats (the judge's centre)")
