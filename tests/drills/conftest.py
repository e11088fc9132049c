"""What drills have measured, one line a fault, behind the results of the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_PROPERTY = "fault"


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Prints a fault and its figures, as ``tell("what was done", detect_s=0.2, recover_s=11.5, lost_steps=0)``.

    ``detect_s``: from the fault until the run knew of it, or had ended with nothing left behind. ``recover_s``: from
    the fault, or from the start of the next driver where one ended, until the run was going on. ``lost_steps``: updates
    that were done again. A figure that makes no sense for a fault is left out.
    """

    def print_line(fault: str, **figures: float) -> None:
        values = [
            f"{name}={value:.1f}" if name.endswith("_s") else f"{name}={value}" for name, value in figures.items()
        ]
        record_property(_PROPERTY, f"{fault}: {' '.join(values)}")

    return print_line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, line in report.user_properties if report.when == "call" else ():
                if name == _PROPERTY:
                    terminalreporter.write_line(f"drill {line}")
