"""What every judge does, with a fake one; then the vLLM judge on the session's engine."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from actors.judge import Answer, JudgeBase, JudgeWorker
from actors.store import LocalStore
from rlhf.errors import ConfigError, DataError, JudgeError
from tests.actors.judging import make_group, write_constitution


class WordJudge(JudgeBase):
    """Counts good and bad in what is between the fences; says nothing about a text with ``mute`` in it."""

    def __init__(self, constitutions, **options):
        super().__init__("words", constitutions, LocalStore(), seed=3, **options)
        self.asked: list[str] = []

    async def _open(self):
        pass

    def _check(self, name, constitution):
        pass

    async def stop(self):
        pass

    async def _ask(self, requests):
        self.asked += [request.text for request in requests]
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        if "mute" in request.text:
            return Answer(None, "it said nothing")
        lines = [line for line in request.text.splitlines() if "[" in line]
        margins = [line.count("good") - line.count("bad") for line in lines]
        margin = margins[0] - (margins[1] if len(margins) > 1 else 0)
        return Answer({" yes": -1.0 + margin, " no": -1.0})


def _run(judge, groups, method="verdicts", constitution="train"):
    async def go():
        await judge.start()
        return await getattr(judge, method)(groups, constitution)

    return asyncio.run(go())


def test_pointwise_verdicts_are_signed_and_centred(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path, extra="centre: 0.5\n")})
    groups = [make_group("a", ["good good", "bad"]), make_group("b", ["good", "bad"], request="scathing")]
    first, second = _run(judge, groups)
    assert [verdict.value for verdict in first] == [1.5, -1.5]
    assert [verdict.value for verdict in second] == [-0.5, 1.5]
    assert [verdict.samples for verdict in first] == [(0,), (1,)]
    assert "words under test@" in first[0].judge


def test_a_missing_answer_is_a_missing_verdict_and_score(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path)})
    groups = [make_group("a", ["good", "mute"])]
    (verdicts,) = _run(judge, groups)
    assert (verdicts[0].value, verdicts[1].value) == (1.0, None)
    assert verdicts[1].error == "it said nothing"
    (scores,) = (judgement.scores for judgement in _run(judge, groups, "judge"))
    assert scores[0].components == {"judge": 1.0}
    assert (scores[1].value, scores[1].error) == (None, "it said nothing")


def test_pairwise_scores_are_the_mean_over_pairs(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path, "pairwise")})
    groups = [make_group("a", ["good good", "good", "bad"])]
    (verdicts,) = _run(judge, groups)
    assert [verdict.samples for verdict in verdicts] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    (scores,) = (judgement.scores for judgement in _run(judge, groups, "judge"))
    assert [score.value for score in scores] == pytest.approx([2.0, 0.5, -2.5])


def test_an_answer_is_asked_for_once(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path), "eval": write_constitution(tmp_path, "pairwise")})
    groups = [make_group("a", ["good", "good", "mute"]), make_group("b", ["good", "bad"])]
    first = _run(judge, groups)
    assert len(judge.asked) == 3, "equal questions are one"
    assert _run(judge, groups) == first
    assert len(judge.asked) == 4, "only the missing answer is asked for again"
    _run(judge, groups, constitution="eval")
    assert len(judge.asked) > 4, "another constitution has answers of its own"


def test_a_judge_whose_bits_depend_on_the_batch_asks_again(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path)}, keep_answers=False)
    groups = [make_group("a", ["good", "good", "bad"])]
    first = _run(judge, groups)
    assert _run(judge, groups) == first
    assert judge.asked[:2] == judge.asked[2:], "the same batch, whatever was judged before"


def test_verdicts_stay_where_they_were_put_and_scores_say_where(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path)})
    groups = [make_group("a", ["good", "mute"]), make_group("b", ["bad", "good"])]
    first, second = _run(judge, groups, "judge")
    assert [first.verdicts, second.verdicts] == _run(judge, groups)
    assert (first.uid, first.num_verdicts, first.errors) == ("a", 2, ("it said nothing",))
    assert second.errors == () and [score.value for score in second.scores] == [-1.0, 1.0]
    assert all(score.evidence == (judgement.verdicts,) for judgement in (first, second) for score in judgement.scores)


def test_the_null_arm_deals_verdicts_and_scores_alike(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path)})
    groups = [make_group(f"p{i}", ["good " * n for n in range(4)]) for i in range(10)]

    async def go():
        await judge.start()
        return await judge.judge(groups, "train", True)

    dealt = asyncio.run(go())
    for judgement in dealt:
        values = [verdict.value for verdict in judgement.verdicts]
        assert values == [score.value for score in judgement.scores]
        assert sorted(values) == [0.0, 1.0, 2.0, 3.0]
        assert all(verdict.reason.startswith("shuffled; was: ") for verdict in judgement.verdicts)
    assert any([score.value for score in judgement.scores] != [0.0, 1.0, 2.0, 3.0] for judgement in dealt)


class ReadingJudge(WordJudge):
    """Reads one token a word."""

    def _answer(self, request):
        answer = super()._answer(request)
        return Answer(answer.log_probs, answer.error, len(request.text.split()))


def test_tokens_are_those_that_the_judge_read(tmp_path):
    judge = ReadingJudge({"train": write_constitution(tmp_path)})
    groups = [make_group("a", ["good", "good", "bad"]), make_group("b", ["mute"])]
    first, second = _run(judge, groups, "judge")
    read = [len(text.split()) for text in judge.asked]
    assert len(read) == 3, "equal texts are one question"
    assert (first.num_tokens, second.num_tokens) == (read[0] + read[1], read[2])
    assert [judgement.num_tokens for judgement in _run(judge, groups, "judge")] == [0, read[2]], (
        "what it knew it read not"
    )


def test_the_centre_can_be_the_margin_of_a_text_that_says_nothing(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path, extra='centre: {content_free: "good good good"}\n')})
    (verdicts,) = _run(judge, [make_group("a", ["good"])])
    assert verdicts[0].value == -2.0
    mute = WordJudge({"train": write_constitution(tmp_path, extra='centre: {content_free: "mute"}\n')})
    with pytest.raises(JudgeError, match="it said nothing"):
        _run(mute, [make_group("a", ["good"])])


def test_unknown_names_and_values_are_refused(tmp_path):
    judge = WordJudge({"train": write_constitution(tmp_path)})
    with pytest.raises(ConfigError, match="'other'.*'train'"):
        _run(judge, [make_group("a", ["good"])], constitution="other")
    with pytest.raises(DataError, match="request = 'neutral'"):
        _run(judge, [make_group("a", ["good"], request="neutral")])


# -- the vLLM judge ----------------------------------------------------------------------------------------------------


def _vllm_judge(generation, file) -> JudgeWorker:
    from tests.actors.vllm.engines import ENGINE

    judge = JudgeWorker(generation.model, ENGINE, {"train": file}, LocalStore(), seed=3, name="tiny")
    judge._engine = generation.worker._engine  # running already: a second engine would cost half a minute
    generation.run(judge.start())
    return judge


@pytest.mark.engine
def test_label_log_probs_are_those_of_the_model(generation, tmp_path):
    from transformers import AutoModelForCausalLM

    judge = _vllm_judge(generation, write_constitution(tmp_path))
    texts = ["I loved this film.", "I hated this film.", "great acting " * 200]
    (verdicts,) = generation.run(judge.verdicts([make_group("a", texts)], "train"))
    assert verdicts[2].value is None
    assert "its context is 256" in verdicts[2].error
    model = AutoModelForCausalLM.from_pretrained(generation.model, dtype=torch.float32)
    tokenizer = judge._tokenizer
    from rlhf.feedback.constitution import load_constitution
    from rlhf.feedback.prompts import build_requests

    rules = load_constitution(tmp_path / "pointwise.yaml")
    payload = make_group("a", texts).payload
    for request, verdict in zip(build_requests(rules, payload, seed=3)[:2], verdicts, strict=False):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(request.text)])).logits[0, -1]
        log_probs = torch.log_softmax(logits, dim=-1)
        yes, no = (log_probs[tokenizer.encode(label)[0]].item() for label in request.labels)
        assert verdict.value == pytest.approx(yes - no, abs=1e-3)
        assert f"log p(' yes') = {yes:.2f}"[:-1] in verdict.reason
        assert math.isfinite(verdict.value)
    (judgement,) = generation.run(judge.judge([make_group("a", texts)], "train"))
    assert judgement.scores[0].value == verdicts[0].value
    questions = build_requests(rules, payload, seed=3)[:2]
    assert judgement.num_tokens == sum(len(tokenizer.encode(question.text)) for question in questions)
    assert not judge._cache, "nothing is kept that a resumed judge would have forgotten"


@pytest.mark.engine
def test_labels_that_are_not_single_tokens_are_refused(generation, tmp_path):
    file = write_constitution(tmp_path)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('" yes"', '" positive"'), encoding="utf-8")
    with pytest.raises(ConfigError, match="' positive', which is 2 tokens"):
        _vllm_judge(generation, file)
