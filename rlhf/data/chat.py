"""Conversations to token ids, through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from rlhf.data.formats import Row, check_unique, read_rows, select_rows
from rlhf.errors import DataError
from rlhf.types import Message

Render = Literal["chat", "plain"]
"""How a conversation becomes tokens: by the chat template, or as its bare text (for models without a template)."""

_ROLES = ("system", "user", "assistant", "tool")


def parse_messages(row: Row, value: Any, what: str) -> tuple[Message, ...]:
    """Returns a conversation from ``[{"role": ..., "content": ...}, ...]``; faults name the row and the turn."""
    if not isinstance(value, list) or not value:
        row.fail(f"no list of turns in {what}", '[{"role": "user", "content": "..."}]', "Mend the row.")
    messages = []
    for index, turn in enumerate(value):
        name = f"{what}, turn {index + 1}"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            row.fail(f"no role and content in {name}", '{"role": ..., "content": ...}', "Mend the turn.")
        if turn["role"] not in _ROLES:
            row.fail(f"role {turn['role']!r} in {name}", f"one of {list(_ROLES)}", "Mend the turn.")
        messages.append(Message(turn["role"], row.check_text(turn["content"], f"{name}, content")))
    return tuple(messages)


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raises a ``DataError`` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            where,
            found=f"chat data, and no chat template in the tokenizer of {tokenizer.name_or_path or 'this model'}",
            needed="a tokenizer with a chat template",
            action="Use an instruction-tuned model, add chat_template to its tokenizer, or set render: plain.",
        )


class RowsConfig(Protocol):
    """What settings of a data file say of its rows."""

    @property
    def path(self) -> str:
        """The file."""
        ...

    @property
    def where(self) -> Mapping[str, str | list[str]]:
        """Wanted values by column."""
        ...

    @property
    def render(self) -> Render:
        """How its texts become tokens."""
        ...

    @property
    def limit(self) -> int | None:
        """How many of the wanted rows are kept; None keeps all."""
        ...


def wanted_rows(config: RowsConfig, tokenizer: Any, *, unique: str | None = None) -> list[Row]:
    """Reads the rows that a file's settings ask for, in order.

    Args:
        config: Which file and which of its rows.
        tokenizer: Of the model; checked for a chat template where the settings need one.
        unique: A column in which no value of the file may occur twice.

    Raises:
        DataError: A fault in the file, no row left, or chat data without a chat template.
    """
    if config.render == "chat":
        require_chat_template(tokenizer, config.path)
    rows = read_rows(config.path)
    if unique is not None:
        check_unique(rows, unique)
    return select_rows(rows, config.where, config.path)[: config.limit]


def render_text(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool, where: str) -> str:
    """Returns a conversation as the chat template writes it.

    Args:
        tokenizer: With a chat template.
        messages: The turns.
        generation_prompt: Whether the opening of the assistant's next turn follows.
        where: Names the row in errors; a template may refuse a conversation (say, two user turns in a row).
    """
    from jinja2 import TemplateError

    require_chat_template(tokenizer, where)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        roles = [message.role for message in messages]
        raise DataError(
            where,
            found=f"turns {roles} that the chat template refuses ({error})",
            needed="a conversation that the model's template can write",
            action="Mend the turns, or change the tokenizer's template.",
        ) from None
    return str(text)


def render_prompt(tokenizer: Any, messages: Sequence[Message], *, render: Render, where: str) -> tuple[int, ...]:
    """Returns the token ids of everything before the answer. [P].

    ``chat``: the template, with the opening of the assistant's turn. ``plain``: the turns' texts with a blank line
    between them, after the tokenizer's begin-of-text token where it has one of its own accord.
    """
    if render == "plain":
        text = "\n\n".join(message.content for message in messages)
        return tuple(int(token) for token in tokenizer(text).input_ids)
    text = render_text(tokenizer, messages, generation_prompt=True, where=where)
    return tuple(encode(tokenizer, text))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text to which nothing is added; special tokens written in it count as such."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]


def encode_completion(tokenizer: Any, text: str, where: str) -> list[int]:
    """Returns the token ids of an answer with end-of-text after it, as an engine would have drawn them. [T].

    Special tokens that are written in the answer are read as plain text, so that data cannot end a turn.
    """
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids]
    return [*ids, end_of_text(tokenizer, where)]


def end_of_text(tokenizer: Any, where: str) -> int:
    """Returns the id of end-of-text, or raises a ``DataError`` where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        action = "Set eos_token in the tokenizer's files."
        raise DataError(where, found="a tokenizer without end-of-text", needed="an eos_token", action=action)
    return int(tokenizer.eos_token_id)


def check_length(num_tokens: int, max_tokens: int, where: str, what: str) -> None:
    """Raises a ``DataError`` if a rendered text is longer than the context allows."""
    if num_tokens > max_tokens:
        action = "Shorten or remove the row, or raise the limit if the model's context allows it."
        raise DataError(where, found=f"{what} of {num_tokens} tokens", needed=f"at most {max_tokens}", action=action)
