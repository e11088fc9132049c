"""Supervised records to training groups: the answer is trained on, end-of-text included; the prompt is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rlhf.config import StrictModel
from rlhf.data.chat import (
    Render,
    check_length,
    encode,
    encode_completion,
    end_of_text,
    parse_messages,
    render_prompt,
    render_text,
    wanted_rows,
)
from rlhf.data.formats import Row, field_text
from rlhf.data.prompts import SUBJECT_COLUMN, UID_COLUMN, row_uid
from rlhf.types import Message, TrainGroup


class SupervisedDataConfig(StrictModel):
    """Where supervised records come from: chats, or instruction, input and output."""

    path: str = Field(min_length=1)
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file. A row with ``messages`` is a chat that ends with the assistant's
    turn; any other row has ``instruction``, ``output`` and perhaps ``input``."""
    where: dict[str, str | list[str]] = {}
    """Keeps only the rows with these values, for example ``{split: train}``."""
    turns: Literal["last", "all"] = "last"
    """Which turns of the assistant are learned: the last one, or each one given what came before it."""
    render: Render = "chat"
    """``chat``: the tokenizer's chat template. ``plain``: the bare text, for models without one."""
    limit: int | None = Field(default=None, ge=1)
    """Keeps only the first so many rows."""


def load_supervised(config: SupervisedDataConfig, tokenizer: Any, max_tokens: int) -> list[TrainGroup]:
    """Reads, checks and renders all records of a file: one group with one completion per learned turn.

    Args:
        config: Which file and how.
        tokenizer: Of the model to train.
        max_tokens: Longest prompt and completion together.

    Raises:
        DataError: A fault in the file, chat data without a chat template, or a record that is too long; with the line.
    """
    groups = []
    for row in wanted_rows(config, tokenizer, unique=UID_COLUMN):
        messages = read_record(row)
        record = row_uid(row, config.path)
        cluster = field_text(row.values.get(SUBJECT_COLUMN)) or record  # a turn is part of the turns after it
        last = len(messages) - 1
        learned = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for turn in learned if config.turns == "all" else [last]:
            group = render_record(messages[: turn + 1], tokenizer, render=config.render, where=row.where)
            uid = record if turn == last else f"{record}/turn{turn}"
            num_tokens = len(group[0]) + len(group[1])
            check_length(num_tokens, max_tokens, row.where, "a record")
            groups.append(TrainGroup(uid, token_array(group[0]), (token_array(group[1]),), cluster=cluster))
    return groups


def read_record(row: Row) -> tuple[Message, ...]:
    """Returns a record's conversation, the assistant's turn last."""
    if "messages" in row.values:
        messages = parse_messages(row, row.list_of("messages"), "column 'messages'")
        if messages[-1].role != "assistant":
            found = f"a chat that ends with the {messages[-1].role}'s turn"
            row.fail(found, "the assistant's turn last: it is what is learned", "Add the answer, or cut the turn.")
        if len(messages) == 1:
            row.fail("a chat of one turn", "something that the assistant answers", "Add the user's turn.")
        return messages
    if "instruction" not in row.values:
        row.fail(
            f"columns {sorted(row.values)}",
            "'messages', or 'instruction' and 'output'",
            "Rename the columns, or convert the file.",
        )
    text = row.text("instruction")
    extra = row.text("input", may_be_empty=True).strip() if row.values.get("input") is not None else ""
    question = f"{text}\n\n{extra}" if extra else text
    return Message("user", question), Message("assistant", row.text("output"))


def render_record(
    messages: Sequence[Message], tokenizer: Any, *, render: Render, where: str
) -> tuple[Sequence[int], list[int]]:
    """Returns the token ids of everything before the last turn [P], and of the last turn with end-of-text [T].

    In a chat the completion is what the template writes for the turn, up to end-of-text, so that the model learns to
    stop as it is stopped when it generates. Where the template rewrites earlier turns once the answer is there, the
    bare answer and end-of-text are taken.
    """
    prompt_ids = render_prompt(tokenizer, messages[:-1], render=render, where=where)
    answer = messages[-1].content
    if render == "plain":
        return prompt_ids, encode_completion(tokenizer, f"\n\n{answer}", where)
    before = render_text(tokenizer, messages[:-1], generation_prompt=True, where=where)
    whole = render_text(tokenizer, messages, generation_prompt=False, where=where)
    end = end_of_text(tokenizer, where)
    mark = tokenizer.convert_ids_to_tokens(end)
    turn = whole[len(before) :] if whole.startswith(before) else ""
    opening, found, rest = turn.partition(answer)
    if not found or mark not in rest:
        return prompt_ids, encode_completion(tokenizer, answer, where)
    closing = rest[: rest.index(mark)]
    body = encode_completion(tokenizer, answer + closing, where)[:-1]
    return prompt_ids, [*encode(tokenizer, opening), *body, end]


def token_array(ids: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Returns token ids as ``TrainGroup`` holds them: int32."""
    return np.asarray(ids, dtype=np.int32)
