"""Readers of JSONL, CSV and parquet files; every fault is a ``DataError`` that names file and line.

A file becomes a list of ``Row``: values by column, and where they came from. Readers check the file itself; what a
column must hold is checked by who asks for it, through the row's methods, so that the error names the line too.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlhf.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is no row: line ends were lost, or it is another kind of file."""

_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair; JSON's reader joins whole ones."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file.

    Attributes:
        values: By column name.
        where: ``"file.jsonl:12"``, or ``"file.parquet:row 12"``; both count from 1.
        number: The row's place in its file, from 0.
    """

    values: Mapping[str, Any]
    where: str
    number: int

    def fail(self, found: str, needed: str, action: str) -> NoReturn:
        """Raises a ``DataError`` about this row."""
        raise DataError(self.where, found=found, needed=needed, action=action)

    def get(self, column: str) -> Any:
        """Returns the value of a column that must be there and must not be null."""
        if column not in self.values:
            have = ", ".join(sorted(self.values)) or "none"
            self.fail(f"no column {column!r} (there are: {have})", f"column {column!r}", "Add it, or name another one.")
        value = self.values[column]
        if value is None:
            self.fail(f"nothing in column {column!r}", "a value", "Fill it in, or remove the row.")
        return value

    def text(self, column: str, *, may_be_empty: bool = False) -> str:
        """Returns a text column; a blank text is refused unless ``may_be_empty``."""
        return self.check_text(self.get(column), f"column {column!r}", may_be_empty=may_be_empty)

    def check_text(self, value: Any, what: str, *, may_be_empty: bool = False) -> str:
        """Returns ``value`` if it is a text, else raises with ``what`` as its name."""
        if not isinstance(value, str):
            self.fail(f"{type(value).__name__} {_short(value)} in {what}", "a text", "Put it in quotes.")
        if not may_be_empty and not value.strip():
            self.fail(f"an empty text in {what}", "a text that is not blank", "Fill it in, or remove the row.")
        return str(value)

    def number_of(self, column: str) -> float:
        """Returns a numeric column; CSV cells that hold a finite number count."""
        value = self.get(column)
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is None or number != number or abs(number) == float("inf"):
            self.fail(f"{_short(value)} in column {column!r}", "a finite number", "Mend it, or remove the row.")
        return number

    def list_of(self, column: str) -> list[Any]:
        """Returns a list column; a CSV cell holds its list as JSON."""
        value = self.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                self.fail(f"broken JSON in column {column!r} ({error.msg})", "a JSON list", "Mend the cell.")
            _check_characters(value, self.where)
        if not isinstance(value, list):
            self.fail(
                f"{type(value).__name__} {_short(value)} in column {column!r}", "a list", "Write it as [..., ...]."
            )
        return list(value)


def read_rows(path: str | Path) -> list[Row]:
    """Reads a whole data file by its suffix: ``.jsonl``, ``.csv`` or ``.parquet``.

    Raises:
        DataError: No such file, unknown suffix, empty file, not UTF-8, broken or endless line, duplicate column or key.
    """
    file = resolve_file(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        found = f"suffix {file.suffix!r}" if file.suffix else "a file name without a suffix"
        raise DataError(
            str(path), found=found, needed=f"one of {sorted(_READERS)}", action="Convert or rename the file."
        )
    rows = [Row(values, where, number) for number, (values, where) in enumerate(reader(file))]
    if not rows:
        raise DataError(f"{path}:1", found="a file without rows", needed="at least one row", action="Fill the file.")
    return rows


def resolve_file(path: str | Path) -> Path:
    """Returns the absolute path of an existing regular file; ``~`` and links are resolved."""
    file = Path(path).expanduser().resolve()
    if file.is_file():
        return file
    if file.exists():
        raise DataError(str(path), found=f"{file} is not a file", needed="a data file", action="Name a file in it.")
    raise DataError(str(path), found=f"no file {file}", needed="an existing data file", action="Check the path.")


def select_rows(rows: Sequence[Row], where: Mapping[str, str | Sequence[str]], source: str) -> list[Row]:
    """Returns the rows whose columns hold one of the wanted values, in order; at least one must be left.

    Args:
        rows: Of one file.
        where: Wanted values by column, for example ``{"split": "train"}``; values are compared as text.
        source: Names the file in errors.
    """
    wanted = {column: {values} if isinstance(values, str) else set(values) for column, values in where.items()}
    kept = [row for row in rows if all(field_text(row.get(column)) in values for column, values in wanted.items())]
    if not kept:
        needed = f"a row with {dict(where)}"
        raise DataError(source, found=f"none among {len(rows)} rows", needed=needed, action="Check the filter.")
    return kept


def field_text(value: Any) -> str | None:
    """Returns a scalar or a list of scalars as text (list items joined by a blank); None for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
        return " ".join(str(item) for item in value)
    return None


def check_unique(rows: Iterable[Row], column: str) -> None:
    """Raises if a value of ``column`` occurs twice; rows without the column are passed over."""
    seen: dict[str, str] = {}
    for row in rows:
        if column not in row.values:
            continue
        value = row.text(column)
        if value in seen:
            found = f"{column} {value!r}, already used at {seen[value]}"
            row.fail(found, f"each {column} once", "Rename or remove one of the rows.")
        seen[value] = row.where


def _decoded_lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield number, _decoded(line, f"{file}:{number}", "utf-8-sig" if number == 1 else "utf-8")


def _decoded(line: bytes, where: str, encoding: str) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            where,
            found=f"a line of more than {MAX_LINE_BYTES // 2**20} MiB",
            needed="one row a line",
            action="Look whether line ends were lost; a JSON list has to become one object a line.",
        )
    if (place := line.find(b"\0")) >= 0:
        raise DataError(
            where,
            found=f"a NUL byte at column {place + 1}, as in a file whose writer was cut off",
            needed="text",
            action="Write the file again, or remove the row.",
        )
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            where,
            found=f"byte 0x{line[error.start]:02x} at column {error.start + 1}, which is not UTF-8",
            needed="UTF-8 text",
            action="Convert the file, for example with iconv.",
        ) from None


def _read_jsonl(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in _decoded_lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            value = json.loads(line, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            found = f"broken JSON ({error.msg}, column {error.colno})"
            raise DataError(where, found=found, needed="one JSON object a line", action="Mend the line.") from None
        except _DuplicateKeyError as error:
            found = f"key {error.key!r} twice"
            raise DataError(where, found=found, needed="each key once", action="Remove one of them.") from None
        if not isinstance(value, dict):
            found = f"a JSON {type(value).__name__}"
            raise DataError(where, found=found, needed="one JSON object a line", action="Mend the line.")
        _check_characters(value, where)
        yield value, where


def _check_characters(value: Any, where: str) -> None:
    """JSON can write half a character; UTF-8, and so every tokenizer and table, cannot."""
    if half := _HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False)):
        raise DataError(
            where,
            found=f"half a character ({ascii(half.group())}), as a text has that was cut inside an emoji",
            needed="whole characters",
            action="Cut texts between characters, or remove the row.",
        )


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return values


def _read_csv(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.reader((line for _, line in _decoded_lines(file)), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{file}:{max(start, reader.line_num)}"
            raise DataError(where, found=f"broken CSV ({error})", needed="valid CSV", action="Mend the row.") from None
        if not cells:
            continue
        where = f"{file}:{start}"
        if header is None:
            header = _check_header(cells, where)
        elif len(cells) != len(header):
            needed = f"{len(header)} cells, as in the first line"
            raise DataError(where, found=f"{len(cells)} cells", needed=needed, action="Mend the row (quote commas).")
        else:
            yield dict(zip(header, cells, strict=True)), where


def _check_header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in names:
        if not name or names.count(name) > 1:
            found = f"column {name!r} twice" if name else "a column without a name"
            raise DataError(
                where, found=found, needed="a different name for each column", action="Mend the first line."
            )
    return names


def _read_parquet(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        found = f"unreadable parquet ({str(error).splitlines()[0]})"
        raise DataError(str(file), found=found, needed="a parquet file", action="Write the file again.") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield values, f"{file}:row {number}"


_READERS: dict[str, Callable[[Path], Iterator[tuple[dict[str, Any], str]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
