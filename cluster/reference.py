"""``make docs``: the reference of all configuration keys, written from the classes that define them.

    python -m cluster.reference docs/config.md

A key, its type, its default and its meaning are each stated once, in code; the document cannot drift from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

INTRODUCTION = """# Configuration keys

Written by `make docs` from the classes that define the keys; edit those, not this file.

A recipe is a YAML file. Precedence, lowest first: a key's default, the files of `include:` in order, the file itself,
`key=value` on the command line (`rlhf run CONFIG roles.learner.ranks=2`; list items go by index, `stages.0.name=x`).
An unknown key is an error.
"""

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class _Place:
    """Where a section stands: ``stages[rl].algorithm`` with the tag ``name: ppo``."""

    path: str
    tag: str

    def __str__(self) -> str:
        return (f"`{self.path}`" if self.path else "Top level") + (f" with `{self.tag}`" if self.tag else "")


def reference(model: type[BaseModel]) -> str:
    """Returns the reference of a root configuration class as Markdown: each section once, with all its places."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    places: dict[str, list[_Place]] = {}
    _visit("", schema, definitions, places)
    parts = [INTRODUCTION, _section([_Place("", "")], schema, definitions)]
    parts += [_section(found, definitions[key], definitions) for key, found in places.items()]
    return "\n".join(parts)


def _visit(path: str, schema: Schema, definitions: Schema, places: dict[str, list[_Place]]) -> None:
    """Collects, depth first, every section below ``schema`` and where it is used; goes into each once."""
    for name, field in schema.get("properties", {}).items():
        found = list(_sections_of(field))
        for key, suffix in found:
            tag = _tag(definitions[key]) if len(found) > 1 else ""
            below = f"{path}.{name}" if path else name
            if tag and suffix == "[]":  # list items go by their tag: stages[rl]
                suffix, tag = f"[{tag.split(': ')[1]}]", ""
            known = key in places
            places.setdefault(key, []).append(_Place(below + suffix, tag))
            if not known:
                _visit(below + suffix, definitions[key], definitions, places)


def _section(places: Sequence[_Place], schema: Schema, definitions: Schema) -> str:
    """One heading, where else the section is used, and one table."""
    lines = [f"## {places[0]}", "", _first_paragraph(schema), ""]
    if len(places) > 1:
        lines += ["The same at " + ", ".join(str(place) for place in places[1:]) + ".", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else _default(field)
        meaning = str(field.get("description", "")) or _meaning_of_section(field, definitions)
        meaning = " ".join(meaning.split()).replace("|", "\\|").replace("``", "`")
        lines.append(f"| `{name}` | {_type(field, definitions)} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _meaning_of_section(field: Schema, definitions: Schema) -> str:
    """A key whose text equals its section's own text carries none in the schema."""
    return next((_first_paragraph(definitions[key]) for key, _ in _sections_of(field)), "")


def _tag(schema: Schema) -> str:
    """The key that tells a section from its alternatives, such as ``kind: rl``; empty if it has none."""
    for name, field in schema.get("properties", {}).items():
        if "const" in field:
            return f"{name}: {field['const']}"
    return ""


def _first_paragraph(schema: Schema) -> str:
    return " ".join(str(schema.get("description", "")).split("\n\n")[0].split()).replace("``", "`")


def _sections_of(field: Schema, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (definition, path suffix) of every section that a key may hold."""
    if "$ref" in field:
        yield field["$ref"].rsplit("/", 1)[1], suffix
    for option in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        yield from _sections_of(option, suffix)
    if isinstance(items := field.get("items"), Mapping):
        yield from _sections_of(items, suffix + "[]")
    if isinstance(values := field.get("additionalProperties"), Mapping):
        yield from _sections_of(values, suffix + ".NAME")


_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _type(field: Schema, definitions: Schema) -> str:
    if "$ref" in field:
        target = definitions[field["$ref"].rsplit("/", 1)[1]]
        return _type(target, definitions) if "enum" in target else "section"
    if options := (*field.get("anyOf", ()), *field.get("oneOf", ())):
        return " or ".join(dict.fromkeys(_type(option, definitions) for option in options))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type", "")
    if kind == "array":
        items: Schema = field.get("items") or next(iter(field.get("prefixItems", ())), {})
        return f"list of {_type(items, definitions)}" if items else "list"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"NAME: {_type(values, definitions)}" if isinstance(values, Mapping) else "mapping"
    word = "path" if field.get("format") == "path" else _WORDS.get(kind, "any")
    limits = [f"{sign} {field[name]:g}" for name, sign in _LIMITS.items() if name in field]
    return " ".join([word, *limits])


def _default(field: Schema) -> str:
    default = field.get("default")
    if isinstance(default, Mapping) and any(True for _ in _sections_of(field)):
        return "see below"
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def main(arguments: Sequence[str]) -> int:
    """Writes the reference to the one path given."""
    from cluster.config import RunConfig

    Path(arguments[0]).write_text(reference(RunConfig), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
