"""A judge behind an OpenAI-compatible endpoint: a small local server plays the service, faults included."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest

from actors.judge_openai import EndpointConfig, OpenAIJudgeWorker
from actors.store import LocalStore
from rlhf.errors import ConfigError, JudgeError
from tests.actors.judge_service import Service, completion
from tests.actors.judging import make_group, write_constitution

KEY = "sk-not-for-logs"


@pytest.fixture
def service(monkeypatch) -> Iterator[Service]:
    monkeypatch.setenv("RLHF_JUDGE_API_KEY", KEY)
    service = Service()
    yield service
    service.close()


def chat(tops: list[tuple[str, float]], refusal: str | None = None) -> dict[str, Any]:
    content = [{"token": tops[0][0], "logprob": tops[0][1], "top_logprobs": [_top(*top) for top in tops]}]
    message = {"role": "assistant", "content": tops[0][0], "refusal": refusal}
    return {"id": "1", "choices": [{"index": 0, "message": message, "logprobs": {"content": content}}]}


def _top(token: str, log_prob: float) -> dict[str, Any]:
    return {"token": token, "logprob": log_prob}


def _judge(service: Service, tmp_path, texts, **changes):
    settings = {"base_url": service.url, "model": "m", "timeout_s": 5.0, "max_retries": 2} | changes

    async def go():
        judge = OpenAIJudgeWorker(
            EndpointConfig.model_validate(settings), {"train": write_constitution(tmp_path)}, LocalStore(), seed=1
        )
        await judge.start()
        try:
            return await judge.verdicts([make_group("a", texts)], "train")
        finally:
            await judge.stop()

    return asyncio.run(go())[0]


def test_the_verdict_is_the_margin_of_the_labels(service, tmp_path):
    def behave(body, tries):
        return 200, completion(-0.5, -1.5) if "loved" in body["prompt"] else completion(-2.0, -0.25)

    service.behave = behave
    verdicts = _judge(service, tmp_path, ["I loved it", "dull"])
    assert [verdict.value for verdict in verdicts] == [1.0, -1.75]
    assert service.keys == [f"Bearer {KEY}"] * 2
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in service.bodies} == {("m", 1, 0.0)}


@pytest.mark.parametrize(
    ("usage", "num_tokens"),
    [({"prompt_tokens": 31, "completion_tokens": 1}, 62), ({"prompt_tokens": -1}, 0), ({}, 0), ("much", 0), (None, 0)],
)
def test_tokens_are_counted_as_the_service_counts_them(service, tmp_path, usage, num_tokens):
    service.behave = lambda body, tries: (200, completion(-0.5, -1.5) | ({} if usage is None else {"usage": usage}))

    async def go():
        settings = EndpointConfig.model_validate({"base_url": service.url, "model": "m"})
        judge = OpenAIJudgeWorker(settings, {"train": write_constitution(tmp_path)}, LocalStore(), seed=1)
        await judge.start()
        try:
            return await judge.judge([make_group("a", ["one", "two"])], "train")
        finally:
            await judge.stop()

    (judgement,) = asyncio.run(go())
    assert [score.value for score in judgement.scores] == [1.0, 1.0], "its bookkeeping spoils no verdict"
    assert judgement.num_tokens == num_tokens


def test_a_chat_is_judged_by_its_first_token(service, tmp_path):
    service.behave = lambda body, tries: (200, chat([("Yes", -1.0), ("yes", -1.0), (" no", -2.0), ("I", -5.0)]))
    (verdict,) = _judge(service, tmp_path, ["good"], api="chat")
    assert verdict.value == pytest.approx(math.log(2 * math.exp(-1.0)) + 2.0)
    assert service.bodies[0]["messages"][0]["role"] == "system"
    service.behave = lambda body, tries: (200, chat([("yes", -1.0), ("no", -2.0)], refusal="I cannot judge that."))
    (verdict,) = _judge(service, tmp_path, ["good"], api="chat")
    assert (verdict.value, verdict.error) == (None, "the judge refused")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"<html>busy</html>", "not a reply"),
        (b"", "not a reply"),
        ({"choices": []}, "not a reply"),
        ({"choices": [{"text": " yes"}]}, "label ' yes' is not among the 0"),
        ({"choices": [{"logprobs": {"top_logprobs": []}}]}, "not among"),
        ({"choices": [{"logprobs": {"top_logprobs": [{" yes": -0.1, "perhaps": -3.0}]}}]}, "label ' no' is not among"),
        ({"choices": [{"logprobs": {"top_logprobs": [{" yes": "high", " no": -3.0}]}}]}, "not a reply"),
        ({"choices": [{"logprobs": {"top_logprobs": [{" yes": float("nan"), " no": -3.0}]}}]}, "not among"),
        ({"choices": [{"logprobs": {"top_logprobs": [{" yes": 4.0, " no": -3.0}]}}]}, "not among"),
        ({"error": {"message": "overloaded"}}, "not a reply"),
    ],
)
def test_garbage_is_a_missing_verdict(service, tmp_path, reply, error):
    service.behave = lambda body, tries: (200, reply)
    (verdict,) = _judge(service, tmp_path, ["good"])
    assert verdict.value is None
    assert error in verdict.error
    assert KEY not in verdict.error


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again(service, tmp_path, status):
    service.behave = lambda body, tries: (status, {}) if tries <= 2 else (200, completion(-0.5, -1.5))
    (verdict,) = _judge(service, tmp_path, ["good"])
    assert verdict.value == 1.0
    assert len(service.bodies) == 3


def test_a_failing_service_is_given_up_after_the_last_try(service, tmp_path):
    service.behave = lambda body, tries: (500, {}) if "bad" in body["prompt"] else (200, completion(-0.5, -1.5))
    good, bad = _judge(service, tmp_path, ["fine", "bad"], max_retries=1)
    assert good.value == 1.0
    assert (bad.value, bad.error) == (None, "the service failed: InternalServerError")
    assert len(service.bodies) == 3


@pytest.mark.parametrize(("status", "kind"), [(400, "BadRequestError"), (422, "UnprocessableEntityError")])
def test_a_refused_question_says_why_and_never_the_key(service, tmp_path, status, kind):
    said = f"no logprobs for {KEY}, sk-{'a' * 30}\x1b[31m \ud83d\nsecond line"
    service.behave = lambda body, tries: (status, {"error": {"message": said}})
    (verdict,) = _judge(service, tmp_path, ["good"], max_retries=0)
    assert verdict.value is None
    assert verdict.error.startswith(f"the service failed: {kind}, status {status}: no logprobs for ")
    assert KEY not in verdict.error and "sk-a" not in verdict.error and "second" not in verdict.error
    assert verdict.error.isprintable()
    service.behave = lambda body, tries: (status, {"error": {"message": "x" * 180 + KEY + "y" * 500}})
    (verdict,) = _judge(service, tmp_path, ["good again"], max_retries=0)
    assert KEY[:8] not in verdict.error and len(verdict.error) < 300


def test_a_service_that_hangs_is_left(service, tmp_path):
    service.behave = lambda body, tries: (time.sleep(3), (200, completion(-0.5, -1.5)))[1]
    (verdict,) = _judge(service, tmp_path, ["good"], timeout_s=0.3, max_retries=0)
    assert verdict.value is None, "its answer would be a verdict"
    assert "APITimeoutError" in verdict.error or "did not answer" in verdict.error


def test_a_service_that_is_not_there_is_a_missing_verdict(service, tmp_path):
    (verdict,) = _judge(service, tmp_path, ["good"], base_url="http://127.0.0.1:9/v1", max_retries=0)
    assert (verdict.value, verdict.error) == (None, "the service failed: APIConnectionError")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_the_judge(service, tmp_path, status):
    service.behave = lambda body, tries: (status, {"error": {"message": f"bad key {KEY}"}})
    with pytest.raises(JudgeError, match=f"status {status}: bad key") as caught:
        _judge(service, tmp_path, ["good"])
    assert KEY not in str(caught.value)


def test_a_judge_that_stopped_asks_nothing_more(service, tmp_path):
    """One place at the service: the first refusal ends the call, and the questions behind it are not put."""
    service.behave = lambda body, tries: (401, {})
    settings = {"base_url": service.url, "model": "m", "max_concurrency": 1, "max_retries": 0}

    async def go():
        judge = OpenAIJudgeWorker(
            EndpointConfig.model_validate(settings), {"train": write_constitution(tmp_path)}, LocalStore(), seed=1
        )
        await judge.start()
        with pytest.raises(JudgeError):
            await judge.verdicts([make_group("a", [f"text {i}" for i in range(20)])], "train")
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a question was left behind"
        await judge.stop()

    asyncio.run(go())
    assert len(service.bodies) <= 2, "the second may have been on its way"


def test_the_key_comes_from_the_environment(service, tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_JUDGE_API_KEY")
    with pytest.raises(ConfigError, match="RLHF_JUDGE_API_KEY"):
        _judge(service, tmp_path, ["good"])
    (verdict,) = _judge(service, tmp_path, ["good"], api_key_variable=None)
    assert verdict.value == 1.0
