"""Hides secrets before a document is written to a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "**********"
"""What stands in a secret's place; the same text as pydantic's secret types show."""

_SECRET_KEY = re.compile(
    r"(^|[_\-.])(password|passwd|secret|secrets|credential|credentials|api[_-]?key|private[_-]?key|authorization)$"
    r"|^token$|(^|[_\-.])(access|auth|bearer|hf|hub|api|session|refresh)[_-]token$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\bsk-[A-Za-z0-9_\-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bBearer\s+[A-Za-z0-9._\-]{8,}|\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]+"
)
_SECRET_SETTING = re.compile(
    r"(\b[\w.\-]*(?:password|passwd|secret|api[_-]?key|private[_-]?key|(?:access|auth|bearer|hf|hub|api)[_-]token))"
    r"=[^\s&]+",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.\-]*://[^/\s:@]*):[^/\s@]+@")


def redact_text(text: str) -> str:
    """Hides keys of well-known services, bearer tokens, ``api_key=...`` and passwords in URLs inside a text."""
    text = _SECRET_SETTING.sub(rf"\1={HIDDEN}", _SECRET_VALUE.sub(HIDDEN, text))
    return _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)


def redact(document: Any) -> Any:
    """Returns a copy of nested mappings and lists with secrets hidden, by the key's name or the value's form.

    ``max_tokens`` and ``pad_token`` are no secrets: a bare ``token``, ``api_key``, ``password`` and their kind are.
    """
    if isinstance(document, Mapping):
        return {
            key: HIDDEN if isinstance(value, str) and value and _SECRET_KEY.search(str(key)) else redact(value)
            for key, value in document.items()
        }
    if isinstance(document, (list, tuple)):
        return [redact(item) for item in document]
    return redact_text(document) if isinstance(document, str) else document
