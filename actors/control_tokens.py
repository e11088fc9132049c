"""A judge's text as tokens, so that only the constitution can write the judge's control tokens.

A tokenizer turns ``<|im_end|>`` into the token that ends a turn wherever it stands, a completion that is judged
included: its writer could close the quotation and speak as the user. In foreign text such words are therefore spelt
out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def encode_guarded(tokenizer: Any, text: str, foreign: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the token ids of ``text``; control words that touch a foreign place become ordinary tokens.

    Where no control word stands in a foreign place this is ``tokenizer.encode(text)``.

    Args:
        tokenizer: A transformers tokenizer.
        text: What the judge reads.
        foreign: First character and end (excluded) of each place that others wrote.
    """
    words = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    if not words:
        return list(tokenizer.encode(text))
    found = list(re.finditer("|".join(map(re.escape, words)), text))
    own = [m for m in found if all(m.end() <= first or m.start() >= end for first, end in foreign)]
    if len(own) == len(found):
        return list(tokenizer.encode(text))
    ids: list[int] = list(tokenizer.encode(""))  # what the tokenizer puts before every text
    start = 0
    for match in own:
        ids += _spelt_out(tokenizer, text[start : match.start()])
        ids.append(tokenizer.convert_tokens_to_ids(match.group()))
        start = match.end()
    return ids + _spelt_out(tokenizer, text[start:])


def _spelt_out(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []
