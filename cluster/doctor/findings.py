"""Findings: what was looked at, what was there, what has to be there, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        ok: Whether it is as it should be.
        found: What is there.
        needed: What has to be there.
        action: What to do; empty if ``ok``.
        level: "error" stops runs or breaks results; "warning" costs speed or may stop some of them.
    """

    name: str
    ok: bool
    found: str
    needed: str
    action: str = ""
    level: Literal["error", "warning"] = "error"


def must(name: str, ok: bool, found: str, needed: str, action: str) -> Check:
    """A finding that is an error unless ``ok``."""
    return Check(name, ok, found, needed, "" if ok else action)


def should(name: str, ok: bool, found: str, needed: str, action: str) -> Check:
    """A finding that is a warning unless ``ok``."""
    return Check(name, ok, found, needed, "" if ok else action, "warning")


def gib(size: float) -> str:
    """Bytes as a text in GiB."""
    return f"{size / GIB:.1f} GiB"


def exit_code(checks: Iterable[Check]) -> int:
    """0 if none of the findings is an error, else 1."""
    return int(any(not check.ok and check.level == "error" for check in checks))


def print_checks(checks: Iterable[Check]) -> None:
    """Prints a table, and what to do below it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "found", "needed")
    checks = list(checks)
    for check in checks:
        mark = "[green]ok[/]" if check.ok else f"[{'red' if check.level == 'error' else 'yellow'}]{check.level}[/]"
        table.add_row(mark, escape(check.name), escape(check.found), escape(check.needed))
    console = Console()
    console.print(table)
    for check in checks:
        if not check.ok:
            console.print(f"{check.level}: {check.name}: {check.action}", markup=False, highlight=False)
