"""Parquet tables of a run: one schema per kind, rows as plain dicts, files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import RecordError
from rlhf.evaluation.completions import ARMS, MEASURES
from rlhf.runs.files import replacing
from rlhf.runs.names import table_file
from rlhf.types import (
    Completion,
    Message,
    Prompt,
    Ranking,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    Score,
    Verdict,
    VersionSpan,
)

_TEXT_MAP = pa.map_(pa.string(), pa.string())
_NUMBER_MAP = pa.map_(pa.string(), pa.float64())
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SPANS = pa.list_(pa.struct([("version", pa.int64()), ("start", pa.int64()), ("end", pa.int64())]))

_ORIGIN = [("stage", pa.string()), ("part", pa.string())]
"""Who wrote a row: the stage, and which of its files (``rlhf.runs.names``)."""

ROLLOUTS = pa.schema(
    [
        *_ORIGIN,
        ("step", pa.int64()),
        ("uid", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("messages", _MESSAGES),
        ("fields", _TEXT_MAP),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("version_spans", _SPANS),
        ("status", pa.string()),
        ("score", pa.float64()),
        ("components", _NUMBER_MAP),
        ("error", pa.string()),
    ]
)
"""One row per completion, siblings together in their order; ``score`` is null where it is missing or not yet given."""

VERDICTS = pa.schema(
    [
        *_ORIGIN,
        ("uid", pa.string()),
        ("samples", pa.list_(pa.int32())),
        ("value", pa.float64()),
        ("reason", pa.string()),
        ("judge", pa.string()),
        ("error", pa.string()),
        ("prompt", pa.string()),
        ("texts", pa.list_(pa.string())),
    ]
)
"""One row per verdict with the texts that were judged, in the order shown; ``value`` is null where none was had."""

RANKINGS = pa.schema(
    [*_ORIGIN, ("uid", pa.string()), ("ranks", pa.list_(pa.int32())), ("source", pa.string())],
)
"""One row per prompt; 1 is best, equal ranks are ties, null is no verdict."""


_SCHEMAS = {"rollouts": ROLLOUTS, "verdicts": VERDICTS, "rankings": RANKINGS}

_EVAL_KINDS = {"num_tokens": pa.int64(), "finish_reason": pa.string()}


def _eval_schema() -> pa.Schema:
    columns = [("uid", pa.string()), ("sample", pa.int32())]
    columns += [(name, pa.string()) for name in ("prompt", "request", "subject", "keywords")]
    for arm in ARMS:
        columns.append((arm, pa.string()))
        columns += [(f"{arm}_{name}", _EVAL_KINDS.get(name, pa.float64())) for name in MEASURES]
    return pa.schema(columns)


def _samples_schema() -> pa.Schema:
    columns = [("uid", pa.string()), ("arm", pa.string()), ("sample", pa.int32())]
    columns += [(name, pa.string()) for name in ("prompt", "request", "subject", "keywords", "text")]
    columns += [(name, _EVAL_KINDS.get(name, pa.float64())) for name in MEASURES]
    return pa.schema([*columns, ("weight_version", pa.int64()), ("best_of_n", pa.bool_())])


EVAL = _eval_schema()
"""One row per held-out prompt and sample, see ``rlhf.evaluation.completions.to_wide``."""

SAMPLES = _samples_schema()
"""One row per completion that an evaluation drew, also those that no arm took; ``best_of_n`` marks a prompt's best."""


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Writes a parquet file atomically; an older file of the same name is replaced.

    Raises:
        RecordError: A row does not fit the schema, or the disk refuses.
    """
    try:
        table = pa.Table.from_pylist([_arrow_row(row, schema) for row in rows], schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        found, needed = str(error), f"columns {', '.join(schema.names)}"
        raise RecordError(str(path), found=found, needed=needed, action="Mend the writer of this row.") from error
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def part_path(run: Path, kind: str, stage: str, part: str) -> Path:
    """Where one part of a stage's table is.

    Args:
        run: The run directory.
        kind: ``"rollouts"``, ``"verdicts"``, ``"rankings"`` or ``"groups"``.
        stage: The stage's name.
        part: See ``rlhf.runs.names``.

    Raises:
        RecordError: A name is no plain word, so the file might lie elsewhere.
    """
    try:
        return run / kind / table_file(stage, part)
    except ValueError as error:
        action = "Use letters, digits, '-' and '_'."
        raise RecordError(f"{kind} of a run", found=str(error), needed="plain words", action=action) from None


def write_part(run: Path, kind: str, stage: str, part: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one part of a stage's rollouts, verdicts or rankings, each row with its origin; see ``part_path``."""
    origin = {"stage": stage, "part": part}
    write_table(part_path(run, kind, stage, part), [origin | dict(row) for row in rows], _SCHEMAS[kind])


def _arrow_row(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    if unknown := sorted(set(row) - set(schema.names)):
        raise pa.ArrowInvalid(f"unknown column {unknown[0]!r}")
    return {name: list(value.items()) if isinstance(value, Mapping) else value for name, value in row.items()}


def read_table(path: Path) -> list[dict[str, Any]]:
    """Reads a parquet file back as the dicts that were written; maps come back as dicts.

    Raises:
        RecordError: The file is missing or broken.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        found, needed = str(error), "a parquet file of this run"
        action = "Remove the file and resume the run, or restore it."
        raise RecordError(str(path), found=found, needed=needed, action=action) from error
    maps = [field.name for field in table.schema if pa.types.is_map(field.type)]
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        for name in maps:
            row[name] = dict(row[name] or ())
    return rows


def prompt_text(prompt: Prompt) -> str:
    """What a reader sees as the prompt: the conversation's last message; earlier ones stay in ``messages``."""
    return prompt.messages[-1].content if prompt.messages else ""


def rollout_rows(group: RolloutGroup, scores: Sequence[Score], step: int | None) -> list[dict[str, Any]]:
    """Rows of one group.

    Args:
        group: The siblings.
        scores: One per sibling, or empty: then the scores inside the group count.
        step: The step that drew them; None outside of a loop.
    """
    if scores and len(scores) != len(group.rollouts):
        raise ValueError(f"{len(scores)} scores for {len(group.rollouts)} siblings of {group.prompt.uid}")
    rows = []
    for sample, rollout in enumerate(group.rollouts):
        score = scores[sample] if scores else rollout.score
        completion = rollout.completion
        rows.append(
            {
                "step": step,
                "uid": group.prompt.uid,
                "sample": sample,
                "prompt": prompt_text(group.prompt),
                "messages": [{"role": m.role, "content": m.content} for m in group.prompt.messages],
                "fields": dict(group.prompt.fields),
                "prompt_token_ids": list(group.prompt.token_ids),
                "text": completion.text,
                "token_ids": completion.token_ids,
                "log_probs": completion.log_probs,
                "finish_reason": completion.finish_reason,
                "version_spans": [
                    {"version": s.version, "start": s.start, "end": s.end} for s in completion.version_spans
                ],
                "status": str(RolloutStatus.PENDING if score is None else score.status),
                "score": None if score is None else score.value,
                "components": {} if score is None else dict(score.components),
                "error": "" if score is None else score.error,
            }
        )
    return rows


def groups_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[RolloutGroup]:
    """Builds the groups back from their rows: token ids and log-probs come back bit for bit."""
    prompts: dict[str, Prompt] = {}
    siblings: dict[str, dict[int, Rollout]] = {}
    for row in rows:
        uid = row["uid"]
        if uid not in prompts:
            messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
            prompts[uid] = Prompt(uid, messages, tuple(row["prompt_token_ids"]), dict(row["fields"]))
        siblings.setdefault(uid, {})[row["sample"]] = _rollout(row)
    return [
        RolloutGroup(prompt, tuple(siblings[uid][sample] for sample in sorted(siblings[uid])))
        for uid, prompt in prompts.items()
    ]


def _rollout(row: Mapping[str, Any]) -> Rollout:
    completion = Completion(
        token_ids=np.asarray(row["token_ids"], dtype=np.int32),
        log_probs=np.asarray(row["log_probs"], dtype=np.float32),
        text=row["text"],
        finish_reason=row["finish_reason"],
        version_spans=tuple(VersionSpan(s["version"], s["start"], s["end"]) for s in row["version_spans"]),
    )
    if row["status"] == RolloutStatus.PENDING:
        return Rollout(completion)
    return Rollout(completion, Score(row["score"], row["components"], row["error"]))


def verdict_rows(group: RolloutGroup, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Rows of the verdicts on one group, each with the texts that it is about."""
    texts = [rollout.completion.text for rollout in group.rollouts]
    return [
        {
            "uid": verdict.uid,
            "samples": list(verdict.samples),
            "value": verdict.value,
            "reason": verdict.reason,
            "judge": verdict.judge,
            "error": verdict.error,
            "prompt": prompt_text(group.prompt),
            "texts": [texts[sample] for sample in verdict.samples],
        }
        for verdict in verdicts
    ]


def verdicts_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """Builds the verdicts back from their rows."""
    return [
        Verdict(row["uid"], tuple(row["samples"]), row["value"], row["reason"], row["judge"], row["error"])
        for row in rows
    ]


def ranking_rows(rankings: Iterable[Ranking]) -> list[dict[str, Any]]:
    """Rows of rankings."""
    return [{"uid": r.uid, "ranks": list(r.ranks), "source": r.source} for r in rankings]


def rankings_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Ranking]:
    """Builds the rankings back from their rows."""
    return [Ranking(row["uid"], tuple(row["ranks"]), row["source"]) for row in rows]
