"""``rlhf judge-eval`` against a judging service: what it asks, what it prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from tests.actors.judge_service import Reply, Service
from tests.actors.judging import write_constitution

KINDS = ("positive", "positive", "mixed", "negative", "negative")
TEXTS = ("loved it, brilliant", "loved it", "it was there", "dull", "dull, awful")


class MarginService(Service):
    """Answers each question with the margin that ``margin_of`` gives for its text; None is an answer without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.margin_of: Callable[[str], float | None] = lambda text: 0.5 if "loved" in text else -0.5
        self.behave = self._answer

    @property
    def models(self) -> list[str]:
        return [body["model"] for body in self.bodies]

    def _answer(self, body: dict[str, Any], tries: int) -> Reply:
        margin = self.margin_of(body["prompt"])
        top = {" maybe": -0.1} if margin is None else {" yes": -3.0 + margin, " no": -3.0}
        return 200, {"id": "1", "choices": [{"logprobs": {"top_logprobs": [top]}}]}


@pytest.fixture
def service() -> Iterator[MarginService]:
    service = MarginService()
    yield service
    service.close()


def judge_eval(folder: Path, service: MarginService, kinds: tuple[str, ...] = KINDS, mode: str = "pointwise") -> int:
    """A recipe whose start model is nowhere: a judge at an endpoint needs none."""
    constitution = write_constitution(folder, mode)
    endpoint = {"base_url": service.url, "model": "m", "api_key_variable": None, "max_retries": 0}
    recipe = {
        "model": str(folder / "no such model"),
        "constitutions": {"training": constitution.name},
        "roles": {"judge": {"endpoint": endpoint}},
        "stages": [{"kind": "sft", "data": {"path": "labels.jsonl"}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"text": text, "label": kind} for text, kind in zip(TEXTS, kinds, strict=True)]
    (folder / "labels.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return main(["judge-eval", str(folder / "recipe.yaml"), "--data", str(folder / "labels.jsonl")])


def test_the_service_is_what_is_measured(service: MarginService, tmp_path: Path, capsys) -> None:
    margins = {"loved it, brilliant": 1.0, "dull, awful": -2.0, "loved it": -0.25, "it was there": 0.0, "dull": -0.5}
    service.margin_of = lambda text: next(margin for part, margin in margins.items() if f" {part} [" in text)
    assert judge_eval(tmp_path, service) == 0
    out = capsys.readouterr().out
    assert "constitution test: 5 of 5 texts judged" in out
    assert "accuracy at margin 0   0.750 on 4 clear texts" in out
    assert "ordered pairs (AUC)    1.000" in out
    assert "Spearman               0.791" in out
    assert "median margin          -0.250 nats" in out
    assert set(service.models) == {"m"} and len(service.models) == 5


def test_what_the_judged_texts_do_not_show_is_unknown(service: MarginService, tmp_path: Path, capsys) -> None:
    service.margin_of = lambda text: 1.0 if "brilliant" in text else None
    assert judge_eval(tmp_path, service) == 0
    out = capsys.readouterr().out
    assert "1 of 5 texts judged" in out
    assert "accuracy at margin 0   1.000 on 1 clear texts" in out
    assert "(AUC)    unknown" in out and "Spearman               unknown" in out
    service.margin_of = lambda text: 1.0 if "there" in text else None
    assert judge_eval(tmp_path, service) == 0
    assert "accuracy at margin 0   unknown on 0 clear texts" in capsys.readouterr().out


def test_a_judge_without_an_answer_is_an_error(service: MarginService, tmp_path: Path, capsys) -> None:
    service.margin_of = lambda text: None
    assert judge_eval(tmp_path, service) == 1
    err = capsys.readouterr().err
    assert err.startswith("MissingFeedbackError: judge-eval: found no verdict on any of 5 texts (label ' yes'")


@pytest.mark.parametrize(
    ("kinds", "mode", "said"),
    [
        (KINDS, "pairwise", "ConfigError: {0}/pairwise.yaml: mode: found 'pairwise'"),
        (("positive",) * 5, "pointwise", "DataError: {0}/labels.jsonl: found no text labelled 'negative'"),
        (("mixed",) * 5, "pointwise", "DataError: {0}/labels.jsonl: found no text labelled 'negative'"),
        ((*KINDS[:4], "bad"), "pointwise", "DataError: {0}/labels.jsonl:5: found label 'bad'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_asked(
    service: MarginService, tmp_path: Path, capsys, kinds: tuple[str, ...], mode: str, said: str
) -> None:
    assert judge_eval(tmp_path, service, kinds, mode) == 2
    assert capsys.readouterr().err.startswith(said.format(tmp_path))
    assert service.models == []
