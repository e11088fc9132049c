"""``rlhf judge-eval``: how far the judge of a recipe agrees with labels given by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cluster.config import RunConfig
from rlhf.data.formats import Row, read_rows
from rlhf.errors import ConfigError, DataError, MissingFeedbackError
from rlhf.feedback.agreement import spearman
from rlhf.feedback.constitution import Constitution, load_constitution
from rlhf.types import Completion, GroupHandle, Message, Prompt, Rollout, RolloutGroup, Verdict, VersionSpan

LABELS = {"positive": 1.0, "mixed": 0.0, "negative": -1.0}


def evaluate_judge(config: RunConfig, data: Path) -> int:
    """Judges every text of a JSONL file with ``text`` and ``label``, prints agreement, and returns 0.

    Raises:
        ConfigError: There is no constitution for training, or it is pairwise: labels are of single texts.
        DataError: A label is unknown, or the clear labels (positive, negative) are all the same.
        MissingFeedbackError: The judge had nothing to say of any text.
    """
    if config.constitutions.training is None:
        raise ConfigError(
            "constitutions.training", found="nothing", needed="a constitution", action="Name the judge's file."
        )
    constitution = load_constitution(config.constitutions.training)
    if constitution.config.mode != "pointwise":
        raise ConfigError(
            f"{config.constitutions.training}: mode",
            found=f"{constitution.config.mode!r}",
            needed="'pointwise', as texts are labelled one at a time",
            action="Give the judge a pointwise constitution.",
        )
    rows = read_rows(str(data))
    texts = [row.text("text") for row in rows]
    labels = _labels(rows, data)
    verdicts = asyncio.run(_verdicts(config, constitution, texts))
    known = [verdict.value for verdict in verdicts if verdict.value is not None]
    if not known:
        raise MissingFeedbackError(
            "judge-eval",
            found=f"no verdict on any of {len(texts)} texts ({verdicts[0].error})",
            needed="a judge that answers",
            action="See roles.judge: model, endpoint, max_model_len.",
        )
    factor = _positive_request(constitution)[1]
    margins = [None if verdict.value is None else verdict.value / factor for verdict in verdicts]
    print("\n".join(_report(labels, margins, constitution.config.name)))
    return 0


def _labels(rows: Sequence[Row], data: Path) -> list[float]:
    """The rows' labels as numbers; both clear ones have to be there, or nothing can be told apart."""
    named = [row.text("label") for row in rows]
    for row, label in zip(rows, named, strict=True):
        if label not in LABELS:
            row.fail(f"label {label!r}", f"one of {', '.join(LABELS)}", "Mend the row.")
    if lacking := {"positive", "negative"} - set(named):
        raise DataError(
            str(data),
            found=f"no text labelled {sorted(lacking)[0]!r}",
            needed="texts of both labels, positive and negative",
            action="Label texts of the other kind too.",
        )
    return [LABELS[label] for label in named]


async def _verdicts(config: RunConfig, constitution: Constitution, texts: Sequence[str]) -> list[Verdict]:
    """The verdicts of the recipe's judge, one in this process, in the order of the texts."""
    from actors.store import LocalStore
    from cluster.fleets import judge_worker

    assert config.constitutions.training is not None, "checked by the caller"
    fields = _positive_request(constitution)[0]
    kind, kwargs = judge_worker(config, {"training": config.constitutions.training}, LocalStore())
    judge = kind(**kwargs)
    await judge.start()
    try:
        groups = [_group(index, text, fields) for index, text in enumerate(texts)]
        return [given[0] for given in await judge.verdicts(groups, "training")]
    finally:
        await judge.stop()


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


def _report(labels: Sequence[float], margins: Sequence[float | None], name: str) -> list[str]:
    """Lines for a reader; what the judged texts do not show is ``unknown``."""
    known = [(label, margin) for label, margin in zip(labels, margins, strict=True) if margin is not None]
    clear = [(label, margin) for label, margin in known if label]
    right = [float((label > 0) == (margin > 0)) for label, margin in clear]
    pairs = [(a[1] > b[1]) + 0.5 * (a[1] == b[1]) for a in clear for b in clear if a[0] > b[0]]
    median = float(np.median([margin for _, margin in known]))
    return [
        f"constitution {name}: {len(known)} of {len(labels)} texts judged",
        f"accuracy at margin 0   {_mean(right)} on {len(clear)} clear texts",
        f"ordered pairs (AUC)    {_mean(pairs)}",
        f"Spearman               {_number(spearman(labels, margins))} (mixed counts as 0)",
        f"median margin          {median:+.3f} nats from the constitution's centre",
    ]


def _mean(values: Sequence[float]) -> str:
    return _number(sum(values) / len(values) if values else None)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
