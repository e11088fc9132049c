"""Configuration: strict frozen models, files that include others, and ``key=value`` overrides.

Precedence, lowest first: a field's default, the files of ``include:`` in order, the file itself, the command line.
Validators check and never rewrite, so a dumped configuration reloads to the same run. Each part of the system documents
its own fields in a ``StrictModel`` beside the code that reads them.
"""

from __future__ import annotations

import difflib
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
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _float_resolver() -> None:
    import re

    pattern = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")
    _UniqueKeyLoader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))


_float_resolver()


def parse_yaml(text: str, where: str) -> Any:
    """Parses one safe YAML document; a syntax error names ``where`` and the line."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader subclass
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{where}:{line}", found=str(error.problem), needed="valid YAML", action="Mend the line."
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
    document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(document, dict):
        found = "an empty file" if document is None else f"a {type(document).__name__}"
        raise ConfigError(str(path), found=found, needed="a mapping of keys", action="Start from a file in configs/.")
    includes = document.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include", found=repr(includes), needed="a list of paths", action="Mend the key.")
    merged: dict[str, Any] = {}
    for name in includes:
        merged = merge(merged, load_file(path.parent / name, (*_open, path)))
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
    below = dict(node) if isinstance(node, Mapping) else {}
    below[head] = _override(below.get(head), rest, value, key)
    return below


def validate(model: type[ModelT], document: Mapping[str, Any], where: str) -> ModelT:
    """Builds ``model`` from a mapping; the first fault becomes a ``ConfigError`` that names the key."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise _explain(faults[0], len(faults), model, where) from None


def _explain(fault: Any, num_faults: int, model: type[BaseModel], where: str) -> ConfigError:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    more = f" ({num_faults - 1} more below it.)" if num_faults > 1 else ""
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], sorted(_field_names(model, location[:-1])), n=1)
        action = f"Did you mean {near[0]!r}?" if near else "Remove it, or see docs/config.md."
        return ConfigError(f"{where}: {key}", found="an unknown key", needed="a documented key", action=action + more)
    found = "nothing" if fault["type"] == "missing" else repr(fault["input"])[:200]
    return ConfigError(
        f"{where}: {key}" if key else where, found=found, needed=fault["msg"], action="Mend the key." + more
    )


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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
