"""Feedback from people: pairs, ranked lists or ratings in a file, to rankings of completions.

What people said about one prompt is merged, over all rows of the file. A ranking never claims an order that nobody
stated: completions that were never compared, directly or through others, do not share a group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from rlhf.config import StrictModel
from rlhf.data.chat import Render, check_length, encode_completion, parse_messages, render_prompt, wanted_rows
from rlhf.data.formats import Row, field_text
from rlhf.data.prompts import SUBJECT_COLUMN
from rlhf.data.supervised import token_array
from rlhf.errors import DataError
from rlhf.feedback.rankings import num_ordered_pairs, ranking_from_scores, ranks_as_floats
from rlhf.types import Message, Prompt, Ranking, TrainGroup

SOURCE = "people"

Comparison = tuple[int, int, float]
"""Two completions of one prompt by index, and how often the first won less how often the second did."""


class PreferenceDataConfig(StrictModel):
    """A file with people's feedback."""

    path: str = Field(min_length=1)
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file; a list in a CSV cell is written as JSON."""
    kind: Literal["auto", "pairs", "rankings", "ratings"] = "auto"
    """``pairs``: columns ``chosen`` and ``rejected``. ``rankings``: ``completions``, best first, where a list inside
    the list is a tie; or in any order beside ``ranks`` (1 is best, null is unknown). ``ratings``: ``completion`` and
    ``rating``, higher is better, one row each. ``auto`` goes by each row's columns."""
    prompt_column: str = "prompt"
    """Column with the user's text, or with a conversation (a list of ``{role, content}``)."""
    where: dict[str, str | list[str]] = {}
    """Keeps only the rows with these values, for example ``{split: train}``."""
    tie_width: FiniteFloat = Field(default=0.0, ge=0.0)
    """Ratings (means, where several people rated the same text) that lie within this width are ties."""
    render: Render = "chat"
    """``chat``: the tokenizer's chat template. ``plain``: the bare text, for models without one."""
    limit: int | None = Field(default=None, ge=1)
    """Keeps only the first so many rows."""


@dataclass(frozen=True, slots=True)
class PeopleFeedback:
    """What people said of completions of one prompt.

    Attributes:
        prompt: With its token ids.
        completions: The texts, each different. [K]
        ranking: Over them, source ``"people"``.
        where: The first row that it comes from.
        cluster: That row's subject, or the prompt, which may have several rankings.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    ranking: Ranking
    where: str
    cluster: str


@dataclass(slots=True)
class _Stated:
    """Everything stated about one prompt."""

    where: Row
    completions: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    ratings: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def index(self, completion: str) -> int:
        if completion not in self.completions:
            self.completions.append(completion)
        return self.completions.index(completion)


def load_people_feedback(config: PreferenceDataConfig, tokenizer: Any, max_tokens: int) -> list[PeopleFeedback]:
    """Reads, checks, merges and renders people's feedback, in the order in which prompts first occur.

    Prompts about which nothing was preferred (only ties, or a single completion) teach nothing and are left out.

    Args:
        config: Which file and how.
        tokenizer: Of the model to train.
        max_tokens: Longest prompt and completion together.

    Raises:
        DataError: A fault in the file, chat data without a chat template, or a text that is too long; with the line.
    """
    rows = wanted_rows(config, tokenizer)
    stated = _collect(config, rows)
    feedback: list[PeopleFeedback] = []
    for number, (messages, about) in enumerate(stated.items()):
        where = about.where.where
        token_ids = render_prompt(tokenizer, messages, render=config.render, where=where)
        merged = _merge(about, config.tie_width)
        name = f"people/{number:05d}"
        cluster = field_text(about.where.values.get(SUBJECT_COLUMN)) or name
        for part, (members, ranks) in enumerate(merged):
            uid = name + (f"/{part}" if len(merged) > 1 else "")
            texts = tuple(about.completions[member] for member in members)
            for text in texts:
                length = len(token_ids) + len(encode_completion(tokenizer, text, where))
                check_length(length, max_tokens, where, "a prompt and completion")
            ranking = Ranking(uid, ranks, SOURCE)
            if num_ordered_pairs(ranking):
                prompt = Prompt(uid, messages, token_ids)
                feedback.append(PeopleFeedback(prompt, texts, ranking, where, cluster))
    if not feedback:
        raise DataError(
            config.path,
            found=f"{len(rows)} rows that prefer no completion to another",
            needed="at least one prompt with two completions of different rank",
            action="Check kind, and that completions of one prompt have the very same prompt text.",
        )
    return feedback


def feedback_groups(feedback: Sequence[PeopleFeedback], tokenizer: Any) -> list[TrainGroup]:
    """Returns groups for the rank loss: K completions with end-of-text, and their ranks."""
    return [
        TrainGroup(
            item.prompt.uid,
            token_array(item.prompt.token_ids),
            tuple(token_array(encode_completion(tokenizer, text, item.where)) for text in item.completions),
            ranks=ranks_as_floats(item.ranking),
            cluster=item.cluster,
        )
        for item in feedback
    ]


def _collect(config: PreferenceDataConfig, rows: Sequence[Row]) -> dict[tuple[Message, ...], _Stated]:
    stated: dict[tuple[Message, ...], _Stated] = {}
    for row in rows:
        about = stated.setdefault(_prompt_messages(config, row), _Stated(row))
        _READERS[_kind_of(row) if config.kind == "auto" else config.kind](row, about)
    return stated


def _kind_of(row: Row) -> str:
    kinds = [kind for column, kind in _KIND_BY_COLUMN.items() if row.values.get(column) is not None]
    if len(kinds) != 1:
        row.fail(
            f"columns {sorted(row.values)}",
            f"one of {sorted(_KIND_BY_COLUMN)}, which tells pairs, rankings and ratings apart",
            "Rename the columns, or set kind.",
        )
    return kinds[0]


def _prompt_messages(config: PreferenceDataConfig, row: Row) -> tuple[Message, ...]:
    value = row.get(config.prompt_column)
    if isinstance(value, list):
        return parse_messages(row, value, f"column {config.prompt_column!r}")
    return (Message("user", row.text(config.prompt_column)),)


def _read_pair(row: Row, about: _Stated) -> None:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen == rejected:
        row.fail("the same text as chosen and rejected", "two different texts", "Remove the row.")
    about.comparisons.append((about.index(chosen), about.index(rejected), 1.0))


def _read_ranking(row: Row, about: _Stated) -> None:
    levels = row.list_of("completions")
    if "ranks" in row.values and row.values["ranks"] is not None:
        ranked = _with_ranks(row, levels)
    else:
        ranked = []
        for level, entry in enumerate(levels, start=1):
            for text in entry if isinstance(entry, list) else [entry]:
                ranked.append((row.check_text(text, f"column 'completions', place {level}"), float(level)))
    texts = [text for text, _ in ranked]
    if len(set(texts)) < len(texts):
        row.fail("the same completion twice in one ranking", "different completions", "Remove one of them.")
    if len(texts) < 2:
        row.fail(f"a ranking of {len(texts)}", "at least two ranked completions", "Remove the row.")
    for (a, rank_a), (b, rank_b) in combinations(ranked, 2):
        vote = float((rank_a < rank_b) - (rank_a > rank_b))
        about.comparisons.append((about.index(a), about.index(b), vote))


def _with_ranks(row: Row, completions: list[Any]) -> list[tuple[str, float]]:
    ranks = row.list_of("ranks")
    if len(ranks) != len(completions):
        found = f"{len(completions)} completions and {len(ranks)} ranks"
        row.fail(found, "a rank for each completion (null where unknown)", "Mend the row.")
    ranked = []
    for place, (text, rank) in enumerate(zip(completions, ranks, strict=True), start=1):
        if rank is None:
            continue
        if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
            row.fail(f"{rank!r} as rank {place}", "a number, or null where unknown", "Mend the row.")
        ranked.append((row.check_text(text, f"column 'completions', place {place}"), float(rank)))
    return ranked


def _read_rating(row: Row, about: _Stated) -> None:
    about.ratings[about.index(row.text("completion"))].append(row.number_of("rating"))


_KIND_BY_COLUMN = {"chosen": "pairs", "completions": "rankings", "rating": "ratings"}
_READERS = {"pairs": _read_pair, "rankings": _read_ranking, "ratings": _read_rating}


def _merge(about: _Stated, tie_width: float) -> list[tuple[list[int], tuple[int | None, ...]]]:
    """Returns groups of completions, each with its ranks."""
    if about.ratings and about.comparisons:
        about.where.fail("ratings and comparisons of one prompt", "one kind for each prompt", "Split the file.")
    if about.ratings:
        means = [sum(values) / len(values) for _, values in sorted(about.ratings.items())]
        ranking = ranking_from_scores("", means, tie_width=tie_width, source=SOURCE)
        return [(list(range(len(means))), ranking.ranks)]
    votes: dict[tuple[int, int], float] = defaultdict(float)
    for a, b, vote in about.comparisons:
        votes[min(a, b), max(a, b)] += vote if a < b else -vote
    merged: list[tuple[list[int], tuple[int | None, ...]]] = []
    for members in _components(votes):
        ranks = _rank_component(members, votes)
        if ranks is not None:
            merged.append((members, ranks))
            continue
        for (a, b), vote in votes.items():  # no single order says just what was said: each pair stands alone
            if a in members and vote:
                merged.append(([a, b], (1, 2) if vote > 0 else (2, 1)))
    return merged


def _components(votes: dict[tuple[int, int], float]) -> list[list[int]]:
    label: dict[int, int] = {}
    for a, b in votes:
        old, new = label.setdefault(b, b), label.setdefault(a, a)
        label = {member: new if name == old else name for member, name in label.items()}
    return [sorted(member for member in label if label[member] == name) for name in sorted(set(label.values()))]


def _rank_component(members: list[int], votes: dict[tuple[int, int], float]) -> tuple[int, ...] | None:
    """Returns ranks that order exactly the pairs that follow from the votes, or None where no ranks do."""
    better = {(a, b) if vote > 0 else (b, a) for (a, b), vote in votes.items() if vote and a in members}
    follows = set(better)
    for via in members:
        into = [a for a, b in follows if b == via]
        follows |= {(a, b) for start, b in follows if start == via for a in into}
    if any((a, a) in follows for a in members):
        return None  # a circle
    standing = {m: sum((a == m) - (b == m) for a, b in follows) for m in members}
    levels = sorted(set(standing.values()), reverse=True)
    place = {member: levels.index(standing[member]) + 1 for member in members}
    ordered = {(a, b) for a in members for b in members if place[a] < place[b]}
    return tuple(place[member] for member in members) if ordered == follows else None
