"""The table of drills says what each of them has measured."""

from __future__ import annotations

from tests.drills.table import as_table, criterion_of


def test_the_criterion_is_the_docstrings() -> None:
    """Something is done to something.

    Passes if it goes on, and
    the record says so.

    More of it.
    """
    found = criterion_of(test_the_criterion_is_the_docstrings.__doc__)
    assert found == "it goes on, and the record says so."
    assert criterion_of(None) == criterion_of("Nothing of the kind.") == ""


def test_rows_have_the_figures_that_were_told() -> None:
    drills = [
        {"fault": "a", "criterion": "it | goes on.", "detect_s": 1.26, "lost_steps": 0},
        {"fault": "b", "criterion": "it | goes on.", "recover_s": 7.0},
    ]
    assert as_table(drills).splitlines() == [
        "| fault | passes if | detect_s | recover_s | lost_steps |",
        "|---|---|---|---|---|",
        "| a | it \\| goes on. | 1.3 |  | 0 |",
        "| b | as above |  | 7.0 |  |",
    ]
