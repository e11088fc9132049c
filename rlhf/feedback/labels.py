"""Whether a judge can answer with a constitution's labels: checked before a run, and by the judge itself."""

from __future__ import annotations

from typing import Any

from rlhf.errors import ConfigError
from rlhf.feedback.constitution import Constitution
from rlhf.feedback.prompts import content_free_request


def label_tokens(tokenizer: Any, constitution: Constitution, *, name: str, judge: str, seed: int) -> tuple[int, int]:
    """The tokens whose log-probabilities are the verdict: the positive label's and the negative one's.

    Args:
        tokenizer: The judge's.
        constitution: Has the labels, and the text that they follow.
        name: Of the constitution in the recipe, for errors.
        judge: The judge's name, for errors.
        seed: Draws the fence in that text.

    Raises:
        ConfigError: A label is not one token after the judge's text, or both are the same one.
    """
    request = content_free_request(constitution, "N/A", seed=seed)
    before: list[int] = tokenizer.encode(request.text)
    ids = []
    for label in request.labels:
        after: list[int] = tokenizer.encode(request.text + label)
        if after[: len(before)] != before or len(after) != len(before) + 1:
            raise ConfigError(
                f"constitution {name}: labels",
                found=f"{label!r}, which is {len(after) - len(before)} tokens for {judge}",
                needed="labels of one token each after the judge's text",
                action="Choose another word; a label after a word or colon mostly begins with a space.",
            )
        ids.append(after[-1])
    if ids[0] == ids[1]:
        raise ConfigError(
            f"constitution {name}: labels",
            found=f"{request.labels}, which are the same token for {judge}",
            needed="two labels that the judge tells apart",
            action="Choose other words.",
        )
    return ids[0], ids[1]


def bare_label(label: str) -> str:
    """A label as words of a chat are compared: without the space before it, and without capitals."""
    return label.strip().casefold()


def check_chat_labels(constitution: Constitution, *, name: str) -> None:
    """In a chat labels are told apart by their words alone; ``ConfigError`` where those are the same."""
    labels = constitution.config.labels
    if bare_label(labels.positive) == bare_label(labels.negative):
        raise ConfigError(
            f"constitution {name}: labels",
            found=f"{labels.positive!r} and {labels.negative!r}",
            needed="labels that differ in more than spaces and capitals",
            action="Choose other words.",
        )
