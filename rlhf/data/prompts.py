"""Prompts from data files, and a cursor over them that a checkpoint can hold."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rlhf.config import StrictModel
from rlhf.data.chat import Render, check_length, parse_messages, render_prompt, wanted_rows
from rlhf.data.formats import Row, field_text
from rlhf.errors import DataError
from rlhf.types import Message, Prompt

_SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

UID_COLUMN = "uid"
"""Names a row for good; without it, the file's name and the row's number do."""

SUBJECT_COLUMN = "subject"
"""What a row is about. Rows of one subject are alike, so what is held out is held out by subject."""


class PromptDataConfig(StrictModel):
    """Where prompts come from. At most one of ``prompt_column``, ``messages_column`` and ``template`` is set."""

    path: str = Field(min_length=1)
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file."""
    where: dict[str, str | list[str]] = {}
    """Keeps only the rows with these values, for example ``{split: train, request: [enthusiastic, scathing]}``."""
    prompt_column: str | None = None
    """Column with the user's text; ``prompt`` unless one of the next two is set."""
    messages_column: str | None = None
    """Column with a conversation, a list of ``{role, content}`` that ends with the user's turn."""
    template: str | None = None
    """The user's text with ``{column}`` slots, for example ``Write a review of a film about {subject}.``"""
    system: str | None = None
    """A system turn put before every conversation that has none."""
    render: Render = "chat"
    """``chat``: the tokenizer's chat template. ``plain``: the bare text, for models without one."""
    limit: int | None = Field(default=None, ge=1)
    """Keeps only the first so many rows."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptDataConfig:
        given = [name for name in ("prompt_column", "messages_column", "template") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: set one")
        if self.template is not None and not _SLOT.search(self.template):
            raise ValueError("template has no {column} slot, so every prompt would be the same")
        return self


def load_prompts(config: PromptDataConfig, tokenizer: Any, max_prompt_tokens: int) -> list[Prompt]:
    """Reads, checks and renders all prompts of a file, in its order.

    Args:
        config: Which file and how.
        tokenizer: Of the model that will answer.
        max_prompt_tokens: The context less the longest answer.

    Raises:
        DataError: A fault in the file, chat data without a chat template, or a prompt that is too long; with the line.
    """
    rows = wanted_rows(config, tokenizer, unique=UID_COLUMN)
    return [_load_prompt(config, row, tokenizer, max_prompt_tokens) for row in rows]


def _load_prompt(config: PromptDataConfig, row: Row, tokenizer: Any, max_prompt_tokens: int) -> Prompt:
    messages = _messages(config, row)
    if config.system is not None and messages[0].role != "system":
        messages = (Message("system", config.system), *messages)
    token_ids = render_prompt(tokenizer, messages, render=config.render, where=row.where)
    check_length(len(token_ids), max_prompt_tokens, row.where, "a prompt")
    fields = {name: text for name, value in row.values.items() if (text := field_text(value)) is not None}
    return Prompt(row_uid(row, config.path), messages, token_ids, fields)


def row_uid(row: Row, path: str) -> str:
    """Returns the row's ``uid`` column, or ``"train/00012"`` from the file's name and the row's number."""
    return row.text(UID_COLUMN) if UID_COLUMN in row.values else f"{Path(path).stem}/{row.number:05d}"


def _messages(config: PromptDataConfig, row: Row) -> tuple[Message, ...]:
    if config.messages_column is not None:
        what = f"column {config.messages_column!r}"
        messages = parse_messages(row, row.list_of(config.messages_column), what)
        if messages[-1].role not in ("user", "tool"):
            row.fail(f"{what} ends with the {messages[-1].role}'s turn", "the user's turn last", "Cut the last turn.")
        return messages
    if config.template is not None:
        text = _SLOT.sub(lambda match: _slot_value(row, match.group(1)), config.template)
        return (Message("user", text),)
    return (Message("user", row.text(config.prompt_column or "prompt")),)


def _slot_value(row: Row, column: str) -> str:
    text = field_text(row.get(column))
    if text is None or not text.strip():
        row.fail(f"no text in column {column!r}", "a value for the template's slot", "Fill it in.")
    return text


class PromptCursor:
    """Gives out prompts without end: each exactly once per epoch, every epoch in an order that the seed fixes.

    The uids it gives are unique: epoch 0 gives ``"e0/train/00012"``, epoch 1 ``"e1/train/00012"``. A batch may span
    two epochs.

    Args:
        prompts: Not empty, uids unique.
        seed: Shuffles each epoch; None keeps the prompts' order.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int | None = None) -> None:
        if not prompts:
            raise ValueError("a cursor needs at least one prompt")
        if len({prompt.uid for prompt in prompts}) < len(prompts):
            raise ValueError("two prompts have the same uid")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._epoch_order(0)
        self._fingerprint = _fingerprint(self._prompts, seed)

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._prompts)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._epoch

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        """Returns the next ``num_prompts`` prompts (at least 1) and moves on."""
        if num_prompts < 1:
            raise ValueError(f"a batch of {num_prompts} prompts")
        batch: list[Prompt] = []
        while len(batch) < num_prompts:
            prompt = self._prompts[self._order[self._position]]
            batch.append(replace(prompt, uid=f"e{self._epoch}/{prompt.uid}"))
            self._position += 1
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order(self._epoch)
        return batch

    def state(self) -> dict[str, int | str]:
        """Returns where the cursor stands, in plain values for a JSON file.

        ``epoch`` counts finished epochs, ``position`` the current epoch's prompts already given out, and
        ``fingerprint`` hashes the prompts and the seed that both refer to.
        """
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a kept state, or raises a ``DataError`` if that state is about other prompts or another seed."""
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                "prompt cursor",
                found="a checkpoint made with other prompts or another shuffle seed",
                needed="the same data as when the run began",
                action="Restore the data file and its settings, or start a new run directory.",
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order(self._epoch)

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._seed is not None:
            digest = hashlib.blake2b(f"{self._seed}\x00{epoch}".encode(), digest_size=16).digest()
            random.Random(int.from_bytes(digest, "big")).shuffle(order)
        return order


def _fingerprint(prompts: Sequence[Prompt], seed: int | None) -> str:
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.uid, prompt.token_ids)).encode())
    return digest.hexdigest()
