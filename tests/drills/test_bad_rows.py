"""Bad rows: refused with their file and line before anything starts, and where a file is spoilt after that."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.recorder import RecorderWorker
from actors.store import LocalStore
from cluster import cli, runner
from rlhf.data import formats
from rlhf.data.preferences import PreferenceDataConfig
from rlhf.errors import DataError
from tests.e2e import recipes

GOOD = {"prompt": "Write a review.", "chosen": "I loved it.", "rejected": "Awful."}
BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"prompt": "Write.", "chosen": ', "broken JSON"),
    "a wrong type": (json.dumps(GOOD | {"chosen": 7}).encode(), "int 7"),
    "a NUL byte": (json.dumps(GOOD).encode()[:30] + bytes(40), "a NUL byte at column 31"),
    "bytes that are no text": (json.dumps(GOOD).encode()[:-1] + b"\xff}", "0xff"),
    "half a character": (b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "half a character"),
    "a row without a column": (json.dumps({"prompt": "Write.", "chosen": "I loved it."}).encode(), "rejected"),
}


class Started(BaseException):
    """Stands for the start of Ray."""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on people's feedback that ends in ``Started`` where it would start Ray."""

    def drive(coroutine: Any) -> int:
        coroutine.close()
        raise Started

    monkeypatch.setattr(runner.asyncio, "run", drive)
    recipes.write_data(tmp_path)
    stages = [
        {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}},
        {"kind": "reward", "learner": recipes.learner()},
    ]
    return recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, stages))


def write_rows(path: Path, bad: bytes) -> None:
    """Two good rows, the bad one, one more good row."""
    good = json.dumps(GOOD).encode()
    path.write_bytes(
        b"\n".join([good, good.replace(b"review", b"poem"), bad, good.replace(b"review", b"song")]) + b"\n"
    )


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_before_anything_starts(
    fault: str, recipe: Path, tell: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One row of people's feedback cannot be used.

    Passes if the command ends with 2 and one line that names file and line, before Ray is started and without a run
    directory; and starts as soon as the row is mended.
    """
    bad, said = BAD_ROWS[fault]
    people = recipe.parent / "people.jsonl"
    write_rows(people, bad)
    began = time.monotonic()
    assert cli.main(["run", str(recipe)]) == 2
    detect_s = time.monotonic() - began
    error = capsys.readouterr().err
    assert error.startswith("DataError: ") and len(error.splitlines()) == 1
    assert f"{people.name}:3: found " in error and said in error
    assert not (recipe.parent / "run").exists()
    write_rows(people, json.dumps(GOOD | {"prompt": "Write a letter."}).encode())
    with pytest.raises(Started):
        cli.main(["run", str(recipe)])
    tell(f"a bad row: {fault}", detect_s=detect_s)


def test_a_line_without_an_end_is_refused_before_it_is_in_memory(
    recipe: Path, tell: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of people's feedback is longer than any row is.

    Passes if the command ends with 2 and names the line, having read no more of it than a row may have.
    """
    people = recipe.parent / "people.jsonl"
    write_rows(people, json.dumps(GOOD | {"chosen": "x" * (formats.MAX_LINE_BYTES + 10)}).encode())
    began = time.monotonic()
    assert cli.main(["run", str(recipe)]) == 2
    detect_s = time.monotonic() - began
    assert f"{people.name}:3: found a line of more than 16 MiB" in capsys.readouterr().err
    tell("a bad row: no line end in 16 MiB", detect_s=detect_s)


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_file_that_is_spoilt_after_the_check_writes_nothing(fault: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    """The file is read again when its stage runs. Passes if the stage fails with file and line and leaves no table."""
    people = tmp_path / "people.jsonl"
    write_rows(people, BAD_ROWS[fault][0])
    recorder = RecorderWorker(tmp_path / "run", LocalStore())
    config = PreferenceDataConfig(path=str(people))
    with pytest.raises(DataError, match=rf"{people.name}:3: found"):
        recorder.import_people_feedback("feedback", config, tiny_model_dir, 160)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
