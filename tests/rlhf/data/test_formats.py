"""Readers: every fault names file and line and says what to do."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.formats import Row, check_unique, field_text, read_rows, select_rows
from rlhf.errors import DataError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_three_formats_read_the_same_rows(tmp_path):
    rows = [{"prompt": "a, b", "score": 1.5}, {"prompt": 'two\nlines "quoted"', "score": -2.0}]
    jsonl = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    csv = write(tmp_path, "a.csv", 'prompt,score\n"a, b",1.5\n"two\nlines ""quoted""",-2.0\n')
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    for path in (jsonl, csv, parquet):
        read = read_rows(path)
        assert [row.text("prompt") for row in read] == [row["prompt"] for row in rows]
        assert [row.number_of("score") for row in read] == [1.5, -2.0]
        assert [row.number for row in read] == [0, 1]
    assert [row.where for row in read_rows(csv)] == [f"{csv}:2", f"{csv}:3"]
    assert read_rows(parquet)[1].where == f"{parquet}:row 2"


@pytest.mark.parametrize(
    ("name", "content", "line", "found"),
    [
        ("a.jsonl", "", 1, "without rows"),
        ("a.jsonl", "\n \n", 1, "without rows"),
        ("a.csv", "prompt,request\n", 1, "without rows"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', 2, "broken JSON"),
        ("a.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": ["x", {"b": "cut \\ud83d"}]}\n', 2, "half a character"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', 3, "a JSON list"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', 1, "key 'a' twice"),
        ("a.jsonl", b'{"a": "ok"}\n{"a": "\xff"}\n', 2, "0xff"),
        ("a.csv", b"a\nok\n\xe9\n", 3, "0xe9"),
        ("a.csv", "a,b\n1,2\n1\n", 3, "1 cells"),
        ("a.csv", "a,a\n1,2\n", 1, "column 'a' twice"),
        ("a.csv", "a,\n1,2\n", 1, "without a name"),
        ("a.csv", 'a,b\n"1"x,2\n', 2, "broken CSV"),
        ("a.csv", 'a,b\n1,"open\n', 2, "broken CSV"),
    ],
)
def test_a_broken_file_names_the_line(tmp_path, name, content, line, found):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.where == f"{path}:{line}"
    assert found in caught.value.found
    assert caught.value.action
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "found"),
    [("none.jsonl", "no file"), (".", "not a file"), ("a.txt", "suffix '.txt'"), ("broken.parquet", "unreadable")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, found):
    write(tmp_path, "a.txt", "hello")
    write(tmp_path, "broken.parquet", "hello")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert str(tmp_path) in caught.value.where
    assert found in caught.value.found


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    assert read_rows(write(tmp_path, "a.csv", b"\xef\xbb\xbfa\n1\n"))[0].text("a") == "1"
    assert read_rows(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": "1"}'))[0].text("a") == "1"


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda row: row.text("nothing"), "no column 'nothing' (there are: blank, list, null, number, text, truth)"),
        (lambda row: row.text("number"), "int 3"),
        (lambda row: row.text("blank"), "an empty text"),
        (lambda row: row.text("null"), "nothing in column 'null'"),
        (lambda row: row.number_of("text"), "'hi'"),
        (lambda row: row.number_of("truth"), "True"),
        (lambda row: row.list_of("text"), "str 'hi'"),
    ],
)
def test_a_wrong_value_names_line_and_column(tmp_path, call, found):
    row = {"text": "hi", "number": 3, "blank": "  ", "null": None, "truth": True, "list": ["a"]}
    path = write(tmp_path, "a.jsonl", "\n" + json.dumps(row))
    with pytest.raises(DataError) as caught:
        call(read_rows(path)[0])
    assert caught.value.where == f"{path}:2"
    assert found in caught.value.found


def test_numbers_must_be_finite_and_lists_may_be_json_in_a_cell(tmp_path):
    rows = read_rows(write(tmp_path, "a.csv", 'n,l\nnan,"[""a"", 1]"\ninf,[a]\n'))
    for row in rows:
        with pytest.raises(DataError, match="finite number"):
            row.number_of("n")
    assert rows[0].list_of("l") == ["a", 1]
    with pytest.raises(DataError, match="half a character"):
        Row({"l": '["\\ud83d"]'}, "f:1", 0).list_of("l")
    with pytest.raises(DataError, match="broken JSON in column 'l'"):
        rows[1].list_of("l")


def test_filters_keep_matching_rows_and_refuse_an_empty_result(tmp_path):
    path = write(
        tmp_path, "a.jsonl", '{"split": "train", "n": 1}\n{"split": "test", "n": 2}\n{"split": "dev", "n": 2}\n'
    )
    rows = read_rows(path)
    assert [row.number for row in select_rows(rows, {"split": ["train", "dev"]}, "a")] == [0, 2]
    assert [row.number for row in select_rows(rows, {"split": ["train", "dev"], "n": "2"}, "a")] == [2]
    with pytest.raises(DataError, match="none among 3 rows"):
        select_rows(rows, {"split": "eval"}, str(path))
    with pytest.raises(DataError, match="no column 'splt'"):
        select_rows(rows, {"splt": "train"}, str(path))


def test_a_uid_that_occurs_twice_names_both_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"uid": "x"}\n{"uid": "y"}\n{"uid": "x"}\n')
    with pytest.raises(DataError) as caught:
        check_unique(read_rows(path), "uid")
    assert caught.value.where == f"{path}:3"
    assert f"{path}:1" in caught.value.found


def test_fields_are_text():
    assert field_text(["a", "b"]) == "a b"
    assert field_text(True) == "true"
    assert field_text(3) == "3"
    assert field_text({"a": 1}) is None
    assert field_text(None) is None
