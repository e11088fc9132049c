"""A constitution: the file in which a user says what the judge is to prefer.

The file is YAML, read by ``load_constitution``. It names the labels between which the judge chooses, the text around
what is judged, a few worked examples, which answers are asked for (``sign``) and where the judge's zero lies
(``centre``). Everything that changes a verdict is in its fingerprint, so verdicts under an older text are never reused.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, model_validator

from rlhf.config import StrictModel, load_file, validate
from rlhf.errors import ConfigError, DataError
from rlhf.types import Prompt

CASE_MARK = "=== case ==="
"""The line of a template that parts its header from the case, which is repeated for every example."""

_SLOT = re.compile(r"\{([a-z_]+)\}")
_HEADER_SLOTS = {"principles"}
_CASE_SLOTS = {"pointwise": {"completion", "prompt", "fence"}, "pairwise": {"first", "second", "prompt", "fence"}}
_NEEDED_SLOTS = {"pointwise": {"completion"}, "pairwise": {"first", "second"}}


class LabelsConfig(StrictModel):
    """The two continuations whose log-probabilities are the verdict."""

    positive: str = Field(min_length=1)
    """What the judge says of a good text (pointwise), or where the first of two is better (pairwise)."""
    negative: str = Field(min_length=1)
    """What the judge says of a bad text (pointwise), or where the second of two is better (pairwise)."""

    @model_validator(mode="after")
    def _differ(self) -> LabelsConfig:
        if self.positive == self.negative:
            raise ValueError("the two labels must differ")
        return self


class ExampleConfig(StrictModel):
    """One judgement that is shown to the judge before the text to judge."""

    text: str = Field(min_length=1)
    """The judged text (pointwise), or the first of two (pairwise)."""
    other: str = ""
    """The second of two texts; pairwise only."""
    prompt: str = ""
    """What the text answers, for templates that show it."""
    label: Literal["positive", "negative"]
    """The right label."""


class SignConfig(StrictModel):
    """Which way a margin counts, by a field of the prompt: a scathing review was asked for, so scorn is good."""

    field: str = Field(min_length=1)
    """Column of the prompt's data row."""
    values: dict[str, FiniteFloat] = Field(min_length=1)
    """Factor of the margin for each value of that column; a prompt with any other value is refused."""

    @model_validator(mode="after")
    def _not_zero(self) -> SignConfig:
        zero = [value for value, factor in self.values.items() if factor == 0]
        if zero:
            raise ValueError(f"the factor of {zero[0]!r} is 0, which throws its verdicts away")
        return self


class ContentFreeCentre(StrictModel):
    """The judge's zero is its margin for a text that says nothing, asked once per judge (Zhao et al., 2021)."""

    content_free: str
    """The text that says nothing, for example ``"N/A"``."""


class ConstitutionConfig(StrictModel):
    """What a constitution file holds."""

    name: str = Field(min_length=1)
    """Names the constitution in records and reports."""
    principles: str = Field(min_length=1)
    """What is good, in plain words; shown to the judge where the template has ``{principles}``."""
    mode: Literal["pointwise", "pairwise"]
    """One text at a time, or two at a time in both orders."""
    template: str = Field(min_length=1)
    """A ``.txt`` file (beside the constitution, or shipped with rlhf), or the text itself."""
    labels: LabelsConfig
    """The judge's two answers."""
    examples: list[ExampleConfig] = []
    """Worked examples, shown in this order before the text to judge."""
    sign: SignConfig | None = None
    """Which way a margin counts; absent means that positive is always good."""
    centre: FiniteFloat | ContentFreeCentre = 0.0
    """Subtracted from every margin (nats): a judge that calls nearly everything positive has its zero elsewhere."""
    max_characters: int = Field(default=4000, ge=16)
    """Longer texts are cut to this many characters before they are judged; the record says so."""

    @model_validator(mode="after")
    def _examples_fit_mode(self) -> ConstitutionConfig:
        for index, example in enumerate(self.examples):
            if (self.mode == "pairwise") != bool(example.other):
                need = "needs 'other', the second text" if self.mode == "pairwise" else "must not have 'other'"
                raise ValueError(f"example {index}: a {self.mode} example {need}")
        return self


@dataclass(frozen=True, slots=True)
class Constitution:
    """A constitution that has been read and checked.

    Attributes:
        config: What the file holds.
        header: The template's first part, shown once, principles filled in; may be empty.
        case: The template's repeated part, which ends where the judge answers.
        fingerprint: Hash of everything that a verdict depends on.
    """

    config: ConstitutionConfig
    header: str
    case: str
    fingerprint: str

    def sign_of(self, prompt: Prompt) -> float:
        """Returns the factor of the prompt's margins; an unknown value of the sign's field is a ``DataError``."""
        sign = self.config.sign
        if sign is None:
            return 1.0
        value = prompt.fields.get(sign.field)
        if value is None or value not in sign.values:
            found = f"no field {sign.field!r}" if value is None else f"{sign.field} = {value!r}"
            raise DataError(
                f"prompt {prompt.uid}",
                found=found,
                needed=f"{sign.field} in {sorted(sign.values)} (constitution {self.config.name!r})",
                action="Mend the row, or add the value to sign.values of the constitution.",
            )
        return sign.values[value]


def load_constitution(path: Path) -> Constitution:
    """Reads and checks a constitution file; every fault is a ``ConfigError`` that names the file and the key."""
    document = load_file(path)
    config = validate(ConstitutionConfig, document, str(path))
    return build_constitution(config, path.resolve().parent, where=str(path))


def build_constitution(config: ConstitutionConfig, folder: Path, *, where: str) -> Constitution:
    """Finds the template, checks its slots and takes the fingerprint.

    Args:
        config: The constitution.
        folder: Where a template file is looked for before the shipped ones.
        where: Names the constitution in errors.
    """
    template, source = _template_text(config.template, folder, where)
    header, mark, case = template.partition(CASE_MARK)
    if not mark:
        header, case = "", template
    case = case.strip("\n").rstrip()
    _check_slots(config, header, case, source)
    header = fill(header.strip("\n"), {"principles": config.principles.strip()})
    content = [config.model_dump(mode="json", exclude={"name", "template"}), header, case]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Constitution(config, header, case, fingerprint)


def fill(template: str, values: dict[str, str]) -> str:
    """Puts ``values`` into the ``{slots}`` of a template in one pass, so braces inside a value stay as they are."""
    return _SLOT.sub(lambda match: values.get(match.group(1), match.group(0)), template)


def fill_and_locate(template: str, values: dict[str, str]) -> tuple[str, list[tuple[str, int, int]]]:
    """Like ``fill``, and says where the values came to stand: the slot's name, first character, end (excluded)."""
    text, places, copied = "", [], 0
    for match in _SLOT.finditer(template):
        text += template[copied : match.start()]
        value = values.get(match.group(1), match.group(0))
        places.append((match.group(1), len(text), len(text) + len(value)))
        text += value
        copied = match.end()
    return text + template[copied:], places


def _template_text(template: str, folder: Path, where: str) -> tuple[str, str]:
    if "\n" in template or not template.endswith(".txt"):
        return template, f"{where}: template"
    beside = (folder / template).resolve()
    if beside.is_relative_to(folder.resolve()) and beside.is_file():
        return beside.read_text(encoding="utf-8"), str(beside)
    shipped = resources.files("rlhf.feedback") / "templates"
    names = sorted(entry.name for entry in shipped.iterdir() if entry.name.endswith(".txt"))
    if template in names:
        return (shipped / template).read_text(encoding="utf-8"), template
    raise ConfigError(
        f"{where}: template",
        found=f"no file {beside}",
        needed=f"a .txt file under {folder} or one of {names}",
        action="Check the name, or write the template into the constitution.",
    )


def _check_slots(config: ConstitutionConfig, header: str, case: str, source: str) -> None:
    allowed, needed = _CASE_SLOTS[config.mode], _NEEDED_SLOTS[config.mode]
    for part, slots in ((header, _HEADER_SLOTS), (case, allowed)):
        unknown = [name for name in _SLOT.findall(part) if name not in slots]
        if unknown:
            raise ConfigError(
                source, found=f"slot {{{unknown[0]}}}", needed=f"one of {sorted(slots)}", action="Mend the template."
            )
    missing = sorted(needed - set(_SLOT.findall(case)))
    if missing:
        raise ConfigError(
            source, found=f"no slot {{{missing[0]}}}", needed=f"it, for mode {config.mode}", action="Add the slot."
        )
    for match in _SLOT.finditer(case):
        before, after = case[: match.start()].count("{fence}"), case[match.end() :].count("{fence}")
        if match.group(1) != "fence" and (before % 2 == 0 or after == 0):
            raise ConfigError(
                source,
                found=f"slot {match.group(0)} outside a fence",
                needed="{fence} before and after every text that is shown to the judge",
                action="Put the slot between two lines that hold {fence}.",
            )
