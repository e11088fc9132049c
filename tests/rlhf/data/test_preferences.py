"""People's feedback: the three shapes, merging, and orders that nobody stated."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.preferences import (
    PreferenceDataConfig,
    _rank_component,
    feedback_groups,
    load_people_feedback,
)
from rlhf.errors import DataError
from rlhf.maths.pairs import ordered_pairs


def write_rows(tmp_path, *rows):
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, kind, tokenizer, **settings):
    return load_people_feedback(PreferenceDataConfig(path=str(path), kind=kind, **settings), tokenizer, 200)


def ranks_by_text(item):
    return dict(zip(item.completions, item.ranking.ranks, strict=True))


def test_pairs_of_one_prompt_are_merged(tmp_path, tokenizer):
    path = write_rows(
        tmp_path,
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "x", "rejected": "y"},
        {"prompt": "p", "chosen": "b", "rejected": "c"},
    )
    first, second = load(path, "pairs", tokenizer)
    assert ranks_by_text(first) == {"a": 1, "b": 2, "c": 3}
    assert ranks_by_text(second) == {"x": 1, "y": 2}
    assert first.ranking.source == "people"
    assert (first.prompt.uid, first.where) == ("people/00000", f"{path}:1")
    assert tokenizer.decode(first.prompt.token_ids).endswith("assistant\n")


def test_votes_decide_and_an_even_vote_is_a_tie(tmp_path, tokenizer):
    ab, ba = ({"prompt": "p", "chosen": x, "rejected": y} for x, y in ("ab", "ba"))
    (item,) = load(write_rows(tmp_path, ab, ba, ab), "pairs", tokenizer)
    assert ranks_by_text(item) == {"a": 1, "b": 2}
    with pytest.raises(DataError, match="prefer no completion"):
        load(write_rows(tmp_path, ab, ba), "pairs", tokenizer)


def test_completions_that_nobody_compared_do_not_meet(tmp_path, tokenizer):
    apart = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "c", "rejected": "d"}]
    items = load(write_rows(tmp_path, *apart), "pairs", tokenizer)
    assert [ranks_by_text(item) for item in items] == [{"a": 1, "b": 2}, {"c": 1, "d": 2}]
    assert [item.prompt.uid for item in items] == ["people/00000/0", "people/00000/1"]
    # a over b and c, d over c: no single order says this and nothing more
    bent = [{"prompt": "p", "chosen": x, "rejected": y} for x, y in ("ab", "ac", "dc")]
    items = load(write_rows(tmp_path, *bent), "pairs", tokenizer)
    assert [ranks_by_text(item) for item in items] == [{"a": 1, "b": 2}, {"a": 1, "c": 2}, {"c": 2, "d": 1}]
    circle = [{"prompt": "p", "chosen": x, "rejected": y} for x, y in ("ab", "bc", "ca")]
    assert len(load(write_rows(tmp_path, *circle), "pairs", tokenizer)) == 3


def test_rankings_in_order_with_ties_and_with_ranks(tmp_path, tokenizer):
    path = write_rows(
        tmp_path,
        {"prompt": "p", "completions": ["a", ["b", "c"], "d"]},
        {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, 1, None]},
    )
    first, second = load(path, "rankings", tokenizer)
    assert ranks_by_text(first) == {"a": 1, "b": 2, "c": 2, "d": 3}
    assert ranks_by_text(second) == {"a": 2, "b": 1}


def test_ratings_are_averaged_and_ranked(tmp_path, tokenizer):
    rows = [("p", "a", 4), ("p", "b", 2), ("p", "a", 2), ("p", "c", 3.2), ("q", "only", 5)]
    path = write_rows(tmp_path, *({"prompt": p, "completion": c, "rating": r} for p, c, r in rows))
    (item,) = load(path, "ratings", tokenizer)
    assert ranks_by_text(item) == {"a": 2, "b": 3, "c": 1}
    (item,) = load(path, "ratings", tokenizer, tie_width=0.5)
    assert ranks_by_text(item) == {"a": 1, "b": 2, "c": 1}


def test_the_kind_follows_from_the_columns(tmp_path, tokenizer):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completions": ["c", "d"]},
        {"prompt": "r", "completion": "e", "rating": 1},
        {"prompt": "r", "completion": "f", "rating": 2},
    ]
    items = load(write_rows(tmp_path, *rows), "auto", tokenizer)
    assert [ranks_by_text(item) for item in items] == [{"a": 1, "b": 2}, {"c": 1, "d": 2}, {"e": 2, "f": 1}]
    for bad, found in (
        ({"prompt": "p", "text": "a"}, "one of ['chosen', 'completions', 'rating']"),
        ({"prompt": "p", "chosen": "a", "rating": 1}, "one of ['chosen', 'completions', 'rating']"),
        ({"prompt": "r", "chosen": "a", "rejected": "b"}, "ratings and comparisons"),
    ):
        path = write_rows(tmp_path, *rows, bad)
        with pytest.raises(DataError) as caught:
            load(path, "auto", tokenizer)
        assert found in str(caught.value)
        assert str(path) in caught.value.where


def test_csv_and_parquet_say_the_same_as_jsonl(tmp_path, tokenizer):
    rows = [{"prompt": "p", "completions": [["a"], ["b", "c"]]}, {"prompt": "q", "completions": [["x"], ["y"]]}]
    expected = load(write_rows(tmp_path, *rows), "rankings", tokenizer)
    parquet = tmp_path / "people.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    table = tmp_path / "people.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "completions"])
        writer.writerows([row["prompt"], json.dumps(row["completions"])] for row in rows)
    for path in (parquet, table):
        read = load(path, "rankings", tokenizer)
        assert [(i.prompt, i.completions, i.ranking) for i in read] == [
            (i.prompt, i.completions, i.ranking) for i in expected
        ]


def test_the_pairs_that_rank_and_preference_losses_see_are_those_that_were_ordered(tmp_path, tokenizer):
    path = write_rows(tmp_path, {"prompt": "p", "completions": ["good", ["fair", "so so"], "bad"]})
    (group,) = feedback_groups(load(path, "rankings", tokenizer), tokenizer)
    assert group.ranks == (1.0, 2.0, 2.0, 3.0)
    texts = [tokenizer.decode(ids) for ids in group.completion_ids]
    assert texts == ["good<|im_end|>", "fair<|im_end|>", "so so<|im_end|>", "bad<|im_end|>"]
    pairs = ordered_pairs(torch.tensor(group.ranks), torch.zeros(4, dtype=torch.int64), 1)
    seen = sorted(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True))
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], "the tie gives none"


@pytest.mark.parametrize(
    ("kind", "row", "found"),
    [
        ("pairs", {"prompt": "p", "chosen": "a"}, "no column 'rejected'"),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": ""}, "an empty text"),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "a"}, "the same text"),
        ("pairs", {"prompt": "", "chosen": "a", "rejected": "b"}, "an empty text"),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "word " * 200}, "a prompt and completion of"),
        ("rankings", {"prompt": "p", "completions": "a"}, "a list"),
        ("rankings", {"prompt": "p", "completions": ["a"]}, "a ranking of 1"),
        ("rankings", {"prompt": "p", "completions": ["a", "a"]}, "same completion twice"),
        ("rankings", {"prompt": "p", "completions": ["a", 3]}, "int 3"),
        ("rankings", {"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "2 completions and 1 ranks"),
        ("rankings", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, "x"]}, "'x' as rank 2"),
        ("rankings", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, None]}, "a ranking of 1"),
        ("ratings", {"prompt": "p", "completion": "a", "rating": "good"}, "'good'"),
        ("ratings", {"prompt": "p", "completion": "a", "rating": None}, "nothing in column 'rating'"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, tokenizer, kind, row, found):
    fine = {"prompt": "o", "chosen": "a", "rejected": "b", "completions": ["a", "b"], "completion": "a", "rating": 1}
    path = write_rows(tmp_path, fine, row)
    with pytest.raises(DataError) as caught:
        load(path, kind, tokenizer)
    assert caught.value.where == f"{path}:2"
    assert found in str(caught.value)


VOTES = st.dictionaries(
    st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] < pair[1]), st.sampled_from([-1.0, 1.0])
)


@given(votes=VOTES)
def test_merged_ranks_order_every_stated_pair_and_claim_no_other(votes):
    members = sorted({member for pair in votes for member in pair})
    ranks = _rank_component(members, votes)
    if ranks is None or not votes:
        return
    place = dict(zip(members, ranks, strict=True))
    stated = {(a, b) if vote > 0 else (b, a) for (a, b), vote in votes.items()}
    assert all(place[a] < place[b] for a, b in stated)
    reach = {a: {b for x, b in stated if x == a} for a in members}
    for _ in members:
        reach = {a: below | {c for b in below for c in reach[b]} for a, below in reach.items()}
    assert all(b in reach[a] for a in members for b in members if place[a] < place[b])
