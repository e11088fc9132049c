"""Rules: rewards that need no model, as small functions of a completion and its prompt.

A rule that cannot be applied, because the prompt's row lacks the field that it asks for, gives a missing score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from rlhf.config import StrictModel
from rlhf.evaluation.text import repetition, words
from rlhf.rewards.shaping import length_band, overlong_penalty
from rlhf.types import Prompt, Rollout, RolloutGroup, Score

_SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class _Rule(StrictModel):
    weight: FiniteFloat = 1.0
    """Factor of the rule's value."""


class LengthRule(_Rule):
    """1 for a completion whose length lies in a band, less outside."""

    rule: Literal["length"]
    """Tag of this rule."""
    min_tokens: int = Field(ge=0)
    """Shortest length that is fine."""
    max_tokens: int = Field(ge=1)
    """Longest length that is fine."""
    slack: int = Field(default=0, ge=0)
    """So many tokens outside the band the value has fallen to 0."""

    @model_validator(mode="after")
    def _band(self) -> LengthRule:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class OverlongRule(_Rule):
    """0 for a short completion, falling to -1 for one that nears the token limit."""

    rule: Literal["overlong"]
    """Tag of this rule."""
    start: int = Field(ge=0)
    """Tokens from which the value falls."""
    end: int = Field(ge=1)
    """Tokens at which it is -1."""

    @model_validator(mode="after")
    def _bends(self) -> OverlongRule:
        if self.start >= self.end:
            raise ValueError(f"start {self.start} is not below end {self.end}")
        return self


class ContainsRule(_Rule):
    """1 for a completion that names words from a field of its prompt."""

    rule: Literal["contains"]
    """Tag of this rule."""
    field: str = Field(min_length=1)
    """Field with beginnings of words, separated by blanks: ``telescop`` is found in "Telescopes"."""
    require: Literal["any", "all"] = "any"
    """Whether one of them is enough."""


class RegexRule(_Rule):
    """1 for a completion in which a regular expression is found."""

    rule: Literal["regex"]
    """Tag of this rule."""
    pattern: str = Field(min_length=1)
    """Python syntax, multi-line; ``{field}`` stands for the prompt's field, taken literally."""

    @model_validator(mode="after")
    def _compiles(self) -> RegexRule:
        try:
            re.compile(_SLOT.sub("x", self.pattern))
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return self


class RepetitionRule(_Rule):
    """0 for a completion without repeated n-grams, falling to nearly -1 for one phrase over and over."""

    rule: Literal["repetition"]
    """Tag of this rule."""
    n: int = Field(default=3, ge=1)
    """Words in a row that count as one phrase."""


class NonEmptyRule(_Rule):
    """1 for a completion that is not blank, else 0."""

    rule: Literal["non_empty"]
    """Tag of this rule."""


class FinishedRule(_Rule):
    """1 for a completion that reached end-of-text, 0 for one that was cut at the token limit."""

    rule: Literal["finished"]
    """Tag of this rule."""


RuleConfig = Annotated[
    LengthRule | OverlongRule | ContainsRule | RegexRule | RepetitionRule | NonEmptyRule | FinishedRule,
    Field(discriminator="rule"),
]


def contains(text: str, stems: Sequence[str], require: Literal["any", "all"]) -> float:
    """Returns 1 if any (or all) of ``stems`` begin a word of the text, upper or lower case alike, else 0."""
    have = words(text)
    found = [any(word.startswith(stem.lower()) for word in have) for stem in stems]
    return float(all(found) if require == "all" else any(found))


def matches(text: str, pattern: str, prompt: Prompt) -> float:
    """Returns 1 if the pattern, with the prompt's fields put in literally, is found in the text, else 0."""
    filled = _SLOT.sub(lambda match: re.escape(_field(prompt, match.group(1))), pattern)
    return float(re.search(filled, text, re.MULTILINE) is not None)


def apply_rule(rule: Any, prompt: Prompt, rollout: Rollout) -> float:
    """Returns the unweighted value of one rule.

    Raises:
        LookupError: The prompt lacks a field that the rule asks for, or the field is blank.
    """
    return _FUNCTIONS[rule.rule](rule, prompt, rollout)


def apply_rules(rules: Sequence[Any], prompt: Prompt, rollout: Rollout) -> Score:
    """Returns the weighted sum of all rules, each rule's own value as a component; missing if one cannot be applied."""
    components: dict[str, float] = {}
    total = 0.0
    for index, rule in enumerate(rules):
        try:
            value = apply_rule(rule, prompt, rollout)
        except LookupError as error:
            return Score(None, components, f"rule {rule.rule}: {error.args[0]}")
        name = rule.rule if rule.rule not in components else f"{rule.rule}_{index}"
        components[name] = value
        total += rule.weight * value
    return Score(total, components)


def score_group(rules: Sequence[Any], group: RolloutGroup) -> tuple[Score, ...]:
    """Returns one score per sibling. [K]."""
    return tuple(apply_rules(rules, group.prompt, rollout) for rollout in group.rollouts)


def _field(prompt: Prompt, name: str) -> str:
    value = prompt.fields.get(name, "")
    if not value.strip():
        raise LookupError(f"prompt {prompt.uid} has no field {name!r}")
    return value


def _contains(rule: ContainsRule, prompt: Prompt, rollout: Rollout) -> float:
    return contains(rollout.completion.text, _field(prompt, rule.field).split(), rule.require)


_FUNCTIONS: dict[str, Callable[[Any, Prompt, Rollout], float]] = {
    "length": lambda rule, _, rollout: length_band(
        len(rollout.completion.token_ids), rule.min_tokens, rule.max_tokens, rule.slack
    ),
    "overlong": lambda rule, _, rollout: overlong_penalty(len(rollout.completion.token_ids), rule.start, rule.end),
    "contains": _contains,
    "regex": lambda rule, prompt, rollout: matches(rollout.completion.text, rule.pattern, prompt),
    "repetition": lambda rule, _, rollout: -repetition(rollout.completion.text, rule.n),
    "non_empty": lambda rule, _, rollout: float(bool(rollout.completion.text.strip())),
    "finished": lambda rule, _, rollout: float(rollout.completion.finish_reason == "stop"),
}
