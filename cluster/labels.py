"""Labels of nodes, and which nodes a selector allows: Ray's rules, for arithmetic without Ray.

A selector maps a label to what its value has to be: ``a``, ``!a``, ``in(a, b)`` or ``!in(a, b)``. See Ray's guide to
label-based scheduling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:[A-Za-z0-9.-]{{1,253}}/)?{_WORD}")
_CONDITION = re.compile(rf"(?P<no>!?)(?:(?P<one>{_WORD})|in\((?P<any>{_WORD}(?:, ?{_WORD})*)\))")


def check_selector(selector: Mapping[str, str]) -> None:
    """Raises ``ValueError`` where a selector is none."""
    for key, condition in selector.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"a label of letters, digits, '-', '_', '.' and at most one '/', instead of {key!r}")
        if not _CONDITION.fullmatch(condition):
            raise ValueError(f"a value, !value, in(a, b) or !in(a, b) for the label {key}, instead of {condition!r}")


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels meets every condition; one without the label meets the negative ones only."""
    return all(_meets(condition, labels.get(key)) for key, condition in selector.items())


def _meets(condition: str, value: str | None) -> bool:
    found = _CONDITION.fullmatch(condition)
    assert found is not None, "checked with the configuration"
    allowed = [found["one"]] if found["one"] else [word.strip() for word in found["any"].split(",")]
    return (value in allowed) != bool(found["no"])


def told(selector: Mapping[str, str]) -> str:
    """A selector as text, such as ``market=spot, zone=!a``."""
    return ", ".join(f"{key}={condition}" for key, condition in selector.items())
