"""What drills have measured: one line a fault behind the results of the tests, and a table where one is asked for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

_PROPERTY = "drill"
FIGURES = ("detect_s", "recover_s", "lost_steps")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drill-table", type=Path, metavar="PATH", help="write what drills have measured as a table")


def criterion_of(docstring: str | None) -> str:
    """What a drill's docstring says after ``Passes if``, to the end of its paragraph."""
    match = re.search(r"Passes if (.*?)(?:\n\s*\n|$)", inspect.cleandoc(docstring or ""), flags=re.DOTALL)
    return " ".join(match[1].split()) if match else ""


@pytest.fixture
def tell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Prints a fault and its figures, as ``tell("what was done", detect_s=0.2, recover_s=11.5, lost_steps=0)``.

    ``detect_s``: from the fault until the run knew of it, or had ended with nothing left behind. ``recover_s``: from
    the fault, or from the start of the next driver where one ended, until the run was going on. ``lost_steps``: updates
    that were done again. A figure that makes no sense for a fault is left out.
    """
    criterion = criterion_of(request.function.__doc__)

    def print_line(fault: str, **figures: float) -> None:
        record_property(_PROPERTY, {"fault": fault, "criterion": criterion} | figures)

    return print_line


def as_text(name: str, value: float) -> str:
    return f"{value:.1f}" if name.endswith("_s") else f"{value}"


def as_table(drills: list[Mapping[str, Any]]) -> str:
    """The drills as a Markdown table, a row each; a criterion stands in the first of the rows that share it."""
    lines = ["| fault | passes if | " + " | ".join(FIGURES) + " |", "|---|---|" + "---|" * len(FIGURES)]
    shown = ""
    for drill in drills:
        criterion = "as above" if drill["criterion"] == shown else drill["criterion"]
        shown = drill["criterion"]
        figures = [as_text(name, drill[name]) if name in drill else "" for name in FIGURES]
        cells = [drill["fault"], criterion, *figures]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _drills(terminalreporter: pytest.TerminalReporter) -> Iterator[Mapping[str, Any]]:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, drill in report.user_properties if report.when == "call" else ():
                if name == _PROPERTY and isinstance(drill, Mapping):
                    yield drill


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    drills = list(_drills(terminalreporter))
    for drill in drills:
        figures = [f"{name}={as_text(name, drill[name])}" for name in FIGURES if name in drill]
        terminalreporter.write_line(f"drill {drill['fault']}: {' '.join(figures)}")
    path = config.getoption("--drill-table", default=None)
    if path is not None:
        path.write_text(as_table(drills), encoding="utf-8")
        terminalreporter.write_line(f"{path}: {len(drills)} rows")
