"""Prompts: what is rendered, what is refused, and a cursor that resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import validate
from rlhf.data.formats import read_rows
from rlhf.data.prompts import PromptCursor, PromptDataConfig, load_prompts
from rlhf.errors import ConfigError, DataError
from rlhf.feedback.constitution import load_constitution
from rlhf.types import Message, Prompt

DATA = Path(__file__).parents[3] / "configs" / "data"


def write_rows(tmp_path, *rows, name="train.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_prompts(n):
    return [Prompt(f"train/{i:05d}", (Message("user", str(i)),), (i,)) for i in range(n)]


def test_a_prompt_column_is_rendered_with_the_chat_template(tmp_path, tokenizer):
    path = write_rows(
        tmp_path, {"prompt": "Write a review.", "request": "scathing", "stars": 3, "keywords": ["a", "b"]}
    )
    (prompt,) = load_prompts(PromptDataConfig(path=str(path)), tokenizer, 100)
    assert prompt.uid == "train/00000"
    assert prompt.messages == (Message("user", "Write a review."),)
    expected = "<|im_start|>user\nWrite a review.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt.token_ids) == expected
    assert all(type(token) is int for token in prompt.token_ids)
    assert prompt.fields == {"prompt": "Write a review.", "request": "scathing", "stars": "3", "keywords": "a b"}


def test_template_messages_and_system_turns(tmp_path, tokenizer):
    path = write_rows(
        tmp_path, {"subject": "a {request}", "request": "short", "chat": [{"role": "user", "content": "Hi"}]}
    )
    config = PromptDataConfig(path=str(path), template="A {request} review of {subject}.", system="Be brief.")
    (prompt,) = load_prompts(config, tokenizer, 100)
    assert prompt.messages == (Message("system", "Be brief."), Message("user", "A short review of a {request}."))
    (prompt,) = load_prompts(PromptDataConfig(path=str(path), messages_column="chat"), tokenizer, 100)
    assert prompt.messages == (Message("user", "Hi"),)


def test_plain_prompts_need_no_template(tmp_path, bare_tokenizer):
    path = write_rows(tmp_path, {"prompt": "Once upon"})
    (prompt,) = load_prompts(PromptDataConfig(path=str(path), render="plain"), bare_tokenizer, 100)
    assert bare_tokenizer.decode(prompt.token_ids) == "Once upon"
    with pytest.raises(DataError, match="no chat template"):
        load_prompts(PromptDataConfig(path=str(path)), bare_tokenizer, 100)


@pytest.mark.parametrize(
    ("row", "settings", "found"),
    [
        ({"prompt": " "}, {}, "an empty text in column 'prompt'"),
        ({"prompt": 3}, {}, "int 3 in column 'prompt'"),
        ({"text": "a"}, {}, "no column 'prompt'"),
        ({"prompt": "word " * 200}, {}, "a prompt of"),
        ({"a": "x"}, {"template": "{subject}"}, "no column 'subject'"),
        ({"subject": ""}, {"template": "{subject}"}, "no text in column 'subject'"),
        ({"chat": []}, {"messages_column": "chat"}, "no list of turns"),
        ({"chat": [{"role": "user"}]}, {"messages_column": "chat"}, "turn 1"),
        ({"chat": [{"role": "boss", "content": "x"}]}, {"messages_column": "chat"}, "role 'boss'"),
        ({"chat": [{"role": "user", "content": ""}]}, {"messages_column": "chat"}, "an empty text"),
        ({"chat": [{"role": "assistant", "content": "x"}]}, {"messages_column": "chat"}, "the assistant's turn"),
        ({"prompt": "ok", "uid": "same"}, {}, "uid 'same'"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, tokenizer, row, settings, found):
    first = {"prompt": "ok", "subject": "ok", "chat": [{"role": "user", "content": "ok"}], "uid": "same"}
    path = write_rows(tmp_path, first, row)
    with pytest.raises(DataError) as caught:
        load_prompts(PromptDataConfig(path=str(path), **settings), tokenizer, 100)
    assert caught.value.where == f"{path}:2"
    assert found in caught.value.found


def test_a_template_that_refuses_a_conversation_names_the_line(tmp_path, tokenizer):
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        path = write_rows(tmp_path, {"prompt": "ok"})
        with pytest.raises(DataError, match="roles must alternate") as caught:
            load_prompts(PromptDataConfig(path=str(path)), tokenizer, 100)
    finally:
        tokenizer.chat_template = original
    assert caught.value.where == f"{path}:1"


def test_filter_and_limit_keep_uids_of_the_file(tmp_path, tokenizer):
    path = write_rows(tmp_path, *({"prompt": f"p {i}", "split": "ab"[i % 2]} for i in range(6)))
    config = PromptDataConfig(path=str(path), where={"split": "b"}, limit=2)
    assert [prompt.uid for prompt in load_prompts(config, tokenizer, 100)] == ["train/00001", "train/00003"]


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_column": "a", "template": "{a}"},
        {"template": "no slot"},
        {"path": ""},
        {"limit": 0},
        {"shufle_seed": 1},
    ],
)
def test_impossible_settings_are_config_errors(settings):
    with pytest.raises(ConfigError):
        validate(PromptDataConfig, {"path": "a.jsonl", **settings}, "config")


@given(
    num=st.integers(1, 12),
    seed=st.none() | st.integers(0, 5),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    cut=st.integers(0, 8),
)
def test_a_cursor_resumes_anywhere_and_gives_each_prompt_once_per_epoch(num, seed, batches, cut):
    whole = PromptCursor(make_prompts(num), seed)
    expected = [prompt.uid for n in batches for prompt in whole.next_batch(n)]
    first = PromptCursor(make_prompts(num), seed)
    given_out = [prompt.uid for n in batches[:cut] for prompt in first.next_batch(n)]
    state = json.loads(json.dumps(first.state()))
    second = PromptCursor(make_prompts(num), seed)
    second.restore(state)
    given_out += [prompt.uid for n in batches[cut:] for prompt in second.next_batch(n)]
    assert given_out == expected
    assert len(set(expected)) == len(expected)
    for epoch in range(len(expected) // num):
        block = expected[epoch * num : (epoch + 1) * num]
        assert sorted(block) == [f"e{epoch}/train/{i:05d}" for i in range(num)]


def test_epochs_are_shuffled_anew_and_alike_for_the_same_seed():
    cursor, again, other = (PromptCursor(make_prompts(30), seed) for seed in (1, 1, 2))
    first, second = (cursor.next_batch(30) for _ in range(2))
    assert [p.token_ids for p in first] != [p.token_ids for p in second]
    assert [p.uid for p in first] == [p.uid for p in again.next_batch(30)]
    assert [p.uid for p in first] != [p.uid for p in other.next_batch(30)]
    plain = PromptCursor(make_prompts(3)).next_batch(4)
    assert [p.uid for p in plain] == ["e0/train/00000", "e0/train/00001", "e0/train/00002", "e1/train/00000"]


@pytest.mark.parametrize("other", [PromptCursor(make_prompts(4), 0), PromptCursor(make_prompts(5), 1)])
def test_a_state_of_other_data_is_refused(other):
    with pytest.raises(DataError, match="other prompts"):
        PromptCursor(make_prompts(5), 0).restore(other.state())


def test_a_cursor_needs_prompts_with_unique_uids():
    with pytest.raises(ValueError, match="at least one"):
        PromptCursor([])
    with pytest.raises(ValueError, match="same uid"):
        PromptCursor(make_prompts(2) + make_prompts(1))
    with pytest.raises(ValueError, match="batch of 0"):
        PromptCursor(make_prompts(2)).next_batch(0)


def test_the_film_prompts_do_not_share_subjects_between_splits(tokenizer):
    splits = {}
    for name, size in (("train", 256), ("validation", 48), ("eval", 128)):
        config = PromptDataConfig(path=str(DATA / f"film_{name}.jsonl"))
        prompts = load_prompts(config, tokenizer, 200)
        assert len(prompts) >= size
        assert prompts[0].uid == f"{name}/00000"
        requests = [prompt.fields["request"] for prompt in prompts]
        assert requests.count("enthusiastic") == requests.count("scathing") == len(requests) // 2
        for prompt in prompts:
            assert prompt.fields["subject"] in prompt.fields["prompt"]
            assert prompt.fields["request"] in prompt.fields["prompt"]
            assert any(stem in prompt.fields["subject"].lower() for stem in prompt.fields["keywords"].split())
        splits[name] = {prompt.fields["subject"] for prompt in prompts}
    assert not splits["eval"] & (splits["train"] | splits["validation"])
    assert not splits["train"] & splits["validation"]
    assert len(set.union(*splits.values())) >= 420


def test_the_judges_labels_are_enough_of_each_kind_and_not_the_judges_examples():
    rows = read_rows(DATA / "judge_labels.jsonl")
    labels = [row.text("label") for row in rows]
    assert len(rows) >= 60
    assert set(labels) == {"positive", "negative", "mixed"}
    assert min(labels.count(label) for label in set(labels)) >= 20
    assert len({row.text("text") for row in rows}) == len(rows)
    shown = {
        example.text
        for path in (DATA.parent / "constitutions").glob("film_*.yaml")
        for example in load_constitution(path).config.examples
    }
    assert not shown & {row.text("text") for row in rows}
