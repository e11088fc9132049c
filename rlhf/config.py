"""Configuration: strict frozen models, files that include others, and ``key=value`` overrides.

Precedence, lowest first: a field's default, the files of ``include:`` in order, the file itself, the command line.
Validators check and never rewrite, so a dumped configuration reloads to the same run. Each part of the system documents
its own fields in a ``StrictModel`` beside the code that reads them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)


class StrictModel(BaseModel):
    """A frozen configuration section: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads ``1e-5`` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`: what it brings in may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError) as error:  # of a scalar that has the form of its type and no such value
            if not isinstance(node, yaml.ScalarNode):
                raise
            problem = f"{node.value!r}, which is no value of its type ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Writes what ``_UniqueKeyLoader`` reads back: text that looks like ``1e5`` goes into quotes."""


_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")
for _class in (_UniqueKeyLoader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Parses one safe YAML document; a syntax error names ``where`` and the line."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader subclass
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{where}:{line}", found=str(error.problem), needed="valid YAML", action="Mend the line."
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where}:{line}",
            found=f"the character {error.character:#06x}",
            needed="text without control characters",
            action="Remove the character, or write it as an escape between double quotes.",
        ) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``base`` with ``over`` laid on it: mappings merge by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def load_file(path: Path, _open: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a YAML file and everything it includes (paths relative to the file) into one plain mapping."""
    path = path.resolve()
    if path in _open:
        chain = " -> ".join(p.name for p in (*_open, path))
        raise ConfigError(str(path), found=f"include cycle {chain}", needed="a tree of files", action="Remove one.")
    if not path.is_file():
        where = str(_open[-1]) if _open else str(path)
        raise ConfigError(where, found=f"no file {path}", needed="an existing YAML file", action="Check the path.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), found=str(error), needed="readable UTF-8 text", action="Check the file.") from None
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        found = "an empty file" if document is None else f"a {type(document).__name__}"
        raise ConfigError(str(path), found=found, needed="a mapping of keys", action="Start from a file in configs/.")
    includes = document.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include", found=repr(includes), needed="a list of paths", action="Mend the key.")
    merged: dict[str, Any] = {}
    for name in includes:
        merged = merge(merged, load_file(path.parent / Path(name).expanduser(), (*_open, path)))
    return merge(merged, document)


def apply_overrides(document: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Lays ``a.b=value`` items over a mapping; values are YAML, list items go by index (``stages.0.steps=2``)."""
    result = dict(document)
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {item!r}", found="no '='", needed="key=value", action="Write a.b=value.")
        result = _override(result, key.split("."), parse_yaml(text, f"override {key}"), key)
    return result


def _override(node: Any, path: Sequence[str], value: Any, key: str) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            needed = f"an index from 0 to {len(node) - 1}"
            raise ConfigError(f"override {key}", found=repr(head), needed=needed, action="Check the list.")
        return [_override(item, rest, value, key) if i == int(head) else item for i, item in enumerate(node)]
    if node is not None and not isinstance(node, Mapping):
        needed = f"a section that can hold {head!r}"
        raise ConfigError(f"override {key}", found=f"the value {_shown(node)}", needed=needed, action="Check the key.")
    below = dict(node) if isinstance(node, Mapping) else {}
    below[head] = _override(below.get(head), rest, value, key)
    return below


def validate(model: type[ModelT], document: Mapping[str, Any], where: str) -> ModelT:
    """Builds ``model`` from a mapping; the first fault becomes a ``ConfigError`` that names the key.

    Types are strict (no text for a number, no 1.0 for a whole number), with lists standing for tuples and text for
    paths, as in JSON: that is what YAML can express.
    """
    try:
        return model.model_validate_json(json.dumps(document, default=str), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise _explain(faults[0], len(faults), model, document, where) from None


def _explain(fault: Any, num_faults: int, model: type[BaseModel], document: Any, where: str) -> ConfigError:
    path = _document_path(fault, document)
    more = f" ({num_faults - 1} more below it.)" if num_faults > 1 else ""
    kind, context = fault["type"], fault.get("ctx", {})
    found, needed, action = _shown(fault["input"]), str(fault["msg"]), "Mend the key."
    if kind == "extra_forbidden":
        found, needed = "an unknown key", "a documented key"
        action = _suggest(path[-1], _field_names(model, [str(part) for part in fault["loc"][:-1]]), model)
    elif kind == "missing":
        found, needed = "nothing", "a value: the key has no default"
        action = "Add the key."
    elif kind == "union_tag_invalid":
        path = [*path, context["discriminator"].strip("'")]
        found, needed = repr(context["tag"]), f"one of {context['expected_tags']}"
        action = _closest(context["tag"], [tag.strip(" '") for tag in context["expected_tags"].split(",")])
    elif kind == "union_tag_not_found":
        path = [*path, context["discriminator"].strip("'")]
        found, needed, action = "nothing", "the key that says which kind this section is", "Add the key."
    elif kind == "value_error":
        found = "keys that do not go together" if isinstance(fault["input"], Mapping) else found
        needed = str(context["error"])
    elif kind == "literal_error":
        action = _closest(str(fault["input"]), [tag.strip(" '") for tag in re.split(",| or ", context["expected"])])
    key = ".".join(path)
    return ConfigError(f"{where}: {key}" if key else where, found=found, needed=needed, action=action + more)


_USER_INFO = re.compile(r"://\S*@")


def _shown(value: Any) -> str:
    """A value as an error shows it: cut short, and without the user and password of an address."""
    return _USER_INFO.sub("://***@", repr(value))[:200]


def _document_path(fault: Any, document: Any) -> list[str]:
    """The fault's keys as the user wrote them: pydantic also names the variants of a union on the way."""
    node, path = document, []
    for depth, part in enumerate(fault["loc"]):
        if isinstance(node, Mapping) and part in node or isinstance(node, list) and part in range(len(node)):
            node = node[part]
        elif depth + 1 < len(fault["loc"]) or fault["type"] not in ("missing", "extra_forbidden"):
            continue
        path.append(str(part))
    return path


def _closest(word: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(choices), n=1)
    return f"Did you mean {near[0]!r}?" if near else "Mend the key."


def _suggest(word: str, siblings: Iterable[str], model: type[BaseModel]) -> str:
    """Names the key that was probably meant: one like it in the same section, or the same word in another."""
    near = difflib.get_close_matches(word, sorted(siblings), n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    elsewhere = _find_key(model, word, ())
    return f"Did you mean {elsewhere!r}?" if elsewhere else "Remove it, or see docs/config.md."


def _find_key(model: type[BaseModel], word: str, above: tuple[str, ...]) -> str | None:
    if word in model.model_fields:
        return ".".join((*above, word))
    if len(above) > 6:  # sections may hold sections of their own kind
        return None
    for name, field in model.model_fields.items():
        for below in _models_in(field.annotation):
            if found := _find_key(below, word, (*above, name)):
                return found
    return None


def _field_names(model: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Names that are valid anywhere along ``location``: unions make the exact section ambiguous, so take all."""
    models, names = [model], set(model.model_fields) if not location else set()
    for part in location:
        below: list[type[BaseModel]] = []
        for owner in models:
            if part in owner.model_fields:
                below += _models_in(owner.model_fields[part].annotation)
            else:
                below.append(owner)  # an index into a list, or the tag of a union
        models = below
        names = {name for owner in models for name in owner.model_fields}
    return names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def dump(config: BaseModel) -> str:
    """Returns the resolved configuration as YAML that ``load_file`` and ``validate`` read back to an equal object."""
    return to_yaml(config.model_dump(mode="json"))


def to_yaml(document: Any) -> str:
    """Returns plain values as YAML that ``parse_yaml`` reads back equal."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
