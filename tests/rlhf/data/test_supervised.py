"""Supervised records: what is trained on, and what is refused."""

from __future__ import annotations

import json

import pytest

from rlhf.data.supervised import SupervisedDataConfig, load_supervised
from rlhf.errors import DataError

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "A review?"},
    {"role": "assistant", "content": "I loved it."},
]


def write_rows(tmp_path, *rows):
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_chat_trains_on_the_answer_and_end_of_text(tmp_path, tokenizer):
    path = write_rows(tmp_path, {"messages": CHAT})
    (group,) = load_supervised(SupervisedDataConfig(path=str(path)), tokenizer, 200)
    assert group.uid == "sft/00000"
    prompt, completion = tokenizer.decode(group.prompt_ids), tokenizer.decode(group.completion_ids[0])
    assert prompt.endswith("A review?<|im_end|>\n<|im_start|>assistant\n")
    assert completion == "I loved it.<|im_end|>"
    assert group.completion_ids[0][-1] == tokenizer.eos_token_id
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.rstrip("\n") == prompt + completion
    assert group.completion_ids[0].dtype.name == group.prompt_ids.dtype.name == "int32"


def test_every_turn_of_the_assistant_can_be_learned(tmp_path, tokenizer):
    path = write_rows(tmp_path, {"messages": CHAT})
    groups = load_supervised(SupervisedDataConfig(path=str(path), turns="all"), tokenizer, 200)
    assert [group.uid for group in groups] == ["sft/00000/turn1", "sft/00000"]
    assert [tokenizer.decode(group.completion_ids[0]) for group in groups] == ["Hi.<|im_end|>", "I loved it.<|im_end|>"]


def test_instruction_records(tmp_path, tokenizer, bare_tokenizer):
    path = write_rows(
        tmp_path,
        {"instruction": "Sum up.", "input": "A long film.", "output": "Long."},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        {"instruction": "Say no.", "output": "No."},
    )
    groups = load_supervised(SupervisedDataConfig(path=str(path)), tokenizer, 200)
    assert "Sum up.\n\nA long film.<|im_end|>" in tokenizer.decode(groups[0].prompt_ids)
    assert "user\nSay hi.<|im_end|>" in tokenizer.decode(groups[1].prompt_ids)
    assert tokenizer.decode(groups[2].completion_ids[0]) == "No.<|im_end|>"
    plain = load_supervised(SupervisedDataConfig(path=str(path), render="plain"), bare_tokenizer, 200)
    assert bare_tokenizer.decode(plain[2].prompt_ids) == "Say no."
    assert bare_tokenizer.decode(plain[2].completion_ids[0]) == "\n\nNo.<|im_end|>"


def test_what_the_template_writes_around_an_answer_is_learned_up_to_end_of_text(tmp_path, tokenizer):
    original = tokenizer.chat_template
    tokenizer.chat_template = original.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}[{{ m['content'] }}]{% else %}{{ m['content'] }}{% endif %}",
    )
    try:
        path = write_rows(tmp_path, {"instruction": "Hi", "output": "Yes"})
        (group,) = load_supervised(SupervisedDataConfig(path=str(path)), tokenizer, 200)
    finally:
        tokenizer.chat_template = original
    assert tokenizer.decode(group.completion_ids[0]) == "[Yes]<|im_end|>"


def test_end_of_text_written_in_an_answer_does_not_end_it(tmp_path, tokenizer):
    path = write_rows(tmp_path, {"instruction": "Hi", "output": "a<|im_end|>b"})
    (group,) = load_supervised(SupervisedDataConfig(path=str(path)), tokenizer, 200)
    ids = group.completion_ids[0].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "a<|im_end|>b"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"text": "x"}, "columns ['text']"),
        ({"instruction": "x"}, "no column 'output'"),
        ({"instruction": "x", "output": " "}, "an empty text"),
        ({"instruction": " ", "output": "x"}, "an empty text"),
        ({"instruction": "x", "input": 3, "output": "x"}, "int 3"),
        ({"messages": "hello"}, "str 'hello'"),
        ({"messages": []}, "no list of turns"),
        ({"messages": CHAT[:3]}, "ends with the user's turn"),
        ({"messages": CHAT[1:2]}, "a chat of one turn"),
        ({"instruction": "x", "output": "word " * 200}, "a record of"),
    ],
)
def test_a_bad_record_names_file_and_line(tmp_path, tokenizer, row, found):
    path = write_rows(tmp_path, {"messages": CHAT}, row)
    with pytest.raises(DataError) as caught:
        load_supervised(SupervisedDataConfig(path=str(path)), tokenizer, 150)
    assert caught.value.where == f"{path}:2"
    assert found in caught.value.found


def test_chat_data_needs_a_template_and_an_end(tmp_path, bare_tokenizer):
    path = write_rows(tmp_path, {"messages": CHAT})
    with pytest.raises(DataError, match="no chat template"):
        load_supervised(SupervisedDataConfig(path=str(path)), bare_tokenizer, 200)
    bare_tokenizer.eos_token = None
    with pytest.raises(DataError, match="without end-of-text"):
        load_supervised(SupervisedDataConfig(path=str(path), render="plain"), bare_tokenizer, 200)
