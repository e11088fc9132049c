"""The key reference: every key once, with type, default and meaning, and the file in docs/ up to date."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.reference import reference
from tests.rlhf.test_config import Root

ROOT = Path(__file__).resolve().parents[2]


def rows_of(text: str) -> dict[str, list[str]]:
    """Key rows of each section by heading."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: [line for line in part.splitlines() if line.startswith("| `")] for part in sections}


def test_every_section_is_listed_with_its_place_and_kind():
    assert list(rows_of(reference(Root))) == [
        "Top level",
        "`optim`",
        "`stages[]`",
        "`stages[].algorithm` with `name: grpo`",
        "`stages[].algorithm` with `name: ppo`",
        "`span`",
    ]


def test_a_section_used_twice_is_written_once_with_both_places():
    text = reference(Root)
    assert text.count("Which loop.") == 1
    assert "The same at `fleets.NAME`." in text


def test_a_row_says_type_default_and_meaning():
    rows = rows_of(reference(Root))
    assert "| `seed` | whole number | `0` | Of everything random. |" in rows["Top level"]
    assert "| `model` | path or null | `null` | A folder. |" in rows["Top level"]
    assert "| `optim` | section | see below | The optimizer. |" in rows["Top level"]
    assert "| `kind` | `sft`, `rl` | required | Which loop. |" in rows["`stages[]`"]
    assert "| `betas` | list of number | `[0.9, 0.99]` | Decay of the two moments. |" in rows["`optim`"]


def test_the_document_is_what_make_docs_writes():
    from cluster.config import RunConfig

    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference(RunConfig), "run `make docs`"


def test_every_key_has_a_meaning():
    from cluster.config import RunConfig

    empty = {
        name: [row for row in rows if row.endswith("|  |")] for name, rows in rows_of(reference(RunConfig)).items()
    }
    assert {name: rows for name, rows in empty.items() if rows} == {}
