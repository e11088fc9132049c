"""``make docs``: the reference of all configuration keys, written from the classes that define them.

    python -m cluster.reference docs/config.md

A key, its type, its default and its meaning are each stated once, in code; the document cannot drift from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
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


def reference(model: type[BaseModel]) -> str:
    """Returns the reference of a root configuration class as Markdown."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    parts = [INTRODUCTION, *_section("", schema, definitions, ())]
    return "\n".join(parts)


def _section(path: str, schema: Schema, definitions: Schema, above: tuple[str, ...]) -> Iterator[str]:
    """One heading, one table, then the sections below it."""
    tag = _tag(schema)
    heading = (f"`{path}`" if path else "Top level") + (f" with `{tag}`" if tag else "")
    yield f"## {heading}\n\n{_first_paragraph(schema)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else _default(field, definitions)
        meaning = str(field.get("description", "")).replace("\n", " ").replace("|", "\\|")
        yield f"| `{name}` | {_type(field, definitions)} | {default} | {meaning} |"
    yield ""
    for name, field in schema.get("properties", {}).items():
        below = f"{path}.{name}" if path else name
        for key, suffix in _sections_of(field):
            if key not in above:  # a section of its own kind is described once
                yield from _section(below + suffix, definitions[key], definitions, (*above, key))


def _tag(schema: Schema) -> str:
    """The key that tells a section from its alternatives, such as ``kind: rl``; empty if it has none."""
    for name, field in schema.get("properties", {}).items():
        if "const" in field:
            return f"{name}: {field['const']}"
    return ""


def _first_paragraph(schema: Schema) -> str:
    return " ".join(str(schema.get("description", "")).split("\n\n")[0].split())


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


def _default(field: Schema, definitions: Schema) -> str:
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
