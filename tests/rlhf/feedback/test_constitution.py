"""Constitution files: what is read, what is refused, and what the fingerprint follows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rlhf.errors import ConfigError, DataError
from rlhf.feedback.constitution import ContentFreeCentre, load_constitution
from rlhf.feedback.prompts import requests_for_texts
from rlhf.feedback.verdicts import fixed_centre
from rlhf.types import Message, Prompt
from tests.rlhf.feedback.conftest import POINTWISE, pairwise_settings, settings

SHIPPED = Path(__file__).parents[3] / "configs" / "constitutions"


def save(tmp_path, document):
    path = tmp_path / "constitution.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_file_is_read_and_its_principles_reach_the_header(tmp_path):
    constitution = load_constitution(save(tmp_path, settings()))
    assert constitution.header.strip() == "Praise is good."
    assert constitution.case.endswith("Sentiment:")
    assert constitution.config.sign.values == {"enthusiastic": 1.0, "scathing": -1.0}


def test_a_template_file_is_found_beside_the_constitution_and_among_the_shipped(tmp_path):
    (tmp_path / "mine.txt").write_text(POINTWISE)
    inline = load_constitution(save(tmp_path, settings()))
    assert load_constitution(save(tmp_path, settings(template="mine.txt"))).fingerprint == inline.fingerprint
    shipped = load_constitution(save(tmp_path, settings(template="film_pointwise.txt")))
    assert "{fence}" in shipped.case


@pytest.mark.parametrize("name", ["none.txt", "../outside.txt"])
def test_a_template_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "outside.txt").write_text(POINTWISE)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ConfigError, match="no file"):
        load_constitution(save(folder, settings(template=name)))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (settings(mode="listwise"), "mode"),
        (settings(labels={"positive": " x", "negative": " x"}), "must differ"),
        (settings(lables={}), "labels"),
        (settings(examples=[{"text": "a", "label": "mixed"}]), "label"),
        (settings(examples=[{"text": "a", "other": "b", "label": "positive"}]), "must not have 'other'"),
        (pairwise_settings(examples=[{"text": "a", "label": "positive"}]), "needs 'other'"),
        (settings(sign={"field": "request", "values": {"scathing": 0}}), "throws its verdicts away"),
        (settings(sign={"field": "request", "values": {}}), "sign.values"),
        (settings(centre=float("nan")), "centre"),
        (settings(template="[{fence}] {completion} {fence} {vote}"), "slot {vote}"),
        (settings(template="[{fence}] {fence} Sentiment:"), "no slot {completion}"),
        (settings(template="{completion} is"), "outside a fence"),
        (settings(template="{fence} {fence} {completion} {fence}"), "outside a fence"),
        (settings(template="{fence} {completion} is"), "outside a fence"),
        (settings(template="{completion}\n=== case ===\n{fence} {completion} {fence}"), "slot {completion}"),
        (pairwise_settings(template="{fence} {first} {fence}"), "no slot {second}"),
    ],
)
def test_a_fault_names_the_file_and_says_what_to_do(tmp_path, document, words):
    path = save(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        load_constitution(path)
    assert words in str(caught.value)
    assert str(path) in caught.value.where
    assert caught.value.action


def test_the_fingerprint_follows_what_changes_verdicts_only(make):
    base = make().fingerprint
    assert make(name="other").fingerprint == base
    for change in (
        {"principles": "Scorn is good."},
        {"centre": 1.0},
        {"examples": []},
        {"sign": None},
        {"labels": {"positive": " good", "negative": " bad"}},
        {"template": POINTWISE + " very"},
        {"max_characters": 100},
    ):
        assert make(**change).fingerprint != base


def test_the_sign_comes_from_the_prompts_field(make):
    def prompt(**fields):
        return Prompt("train/1", (Message("user", "x"),), (1,), fields)

    constitution = make()
    assert constitution.sign_of(prompt(request="enthusiastic")) == 1.0
    assert constitution.sign_of(prompt(request="scathing")) == -1.0
    assert make(sign=None).sign_of(prompt()) == 1.0
    with pytest.raises(DataError, match="no field 'request'"):
        constitution.sign_of(prompt())
    with pytest.raises(DataError, match=r"prompt train/1: found request = 'rude'.*enthusiastic"):
        constitution.sign_of(prompt(request="rude"))


def test_the_centre_is_a_number_or_to_be_measured(make):
    assert fixed_centre(make(centre=2)) == 2.0
    measured = make(centre={"content_free": "N/A"})
    assert measured.config.centre == ContentFreeCentre(content_free="N/A")
    assert fixed_centre(measured) is None


def test_the_shipped_constitutions_load_and_share_neither_wording_nor_examples():
    train = load_constitution(SHIPPED / "film_reviews.yaml")
    evaluation = load_constitution(SHIPPED / "film_reviews_eval.yaml")
    assert train.case != evaluation.case
    assert not {e.text for e in train.config.examples} & {e.text for e in evaluation.config.examples}
    assert len(train.config.examples) == len(evaluation.config.examples) == 4
    for constitution in (train, evaluation):
        assert fixed_centre(constitution) is not None
        assert constitution.config.sign is not None
        assert set(constitution.config.sign.values) == {"enthusiastic", "scathing"}


def test_every_shipped_constitution_builds_its_questions():
    prompt = Prompt("train/1", (Message("user", "Write a review."),), (1,), {"request": "scathing"})
    paths = sorted(SHIPPED.glob("*.yaml"))
    assert len(paths) == 3
    for path in paths:
        constitution = load_constitution(path)
        requests = requests_for_texts(constitution, prompt, ["Nice.", "Bad."], seed=0)
        assert len(requests) == 2
        for request in requests:
            assert not re.search(r"\{[a-z]+\}", request.text)
            assert request.text == request.text.rstrip()
