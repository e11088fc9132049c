"""The judge is a service that answers, but nonsense: no verdict is made of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.judge_openai import OpenAIJudgeWorker
from actors.recorder import RecorderWorker
from actors.settings import EndpointConfig
from actors.store import LocalStore
from rlhf.errors import MissingFeedbackError
from rlhf.feedback.rankings import RankingConfig
from rlhf.loops.label import LabelConfig, LabelRoles, label
from rlhf.types import GroupHandle, Judgement, Prompt
from tests.actors.judge_service import Service, completion
from tests.actors.judging import make_group, write_constitution
from tests.fakes import OpenGate

PROMPTS, SAMPLES, CHUNK = 8, 4, 4
STAGE = "feedback"


def _log_probs(**top: Any) -> dict[str, Any]:
    labels = {f" {name}": value for name, value in top.items()}
    return {"id": "1", "choices": [{"text": " yes", "index": 0, "logprobs": {"top_logprobs": [labels]}}]}


GARBAGE: dict[str, Any] = {
    "a page of HTML": b"<html><body>Welcome to the proxy</body></html>",
    "nothing": b"",
    "JSON of another kind": {"answer": "yes", "score": 0.93},
    "no log-probabilities": {"id": "1", "choices": [{"text": " yes", "index": 0}]},
    "other labels": _log_probs(maybe=-0.1, perhaps=-2.0),
    "one label of two": _log_probs(yes=-0.1, maybe=-2.0),
    "log-probabilities above zero": _log_probs(yes=3.0, no=1.0),
    "a text for a number": _log_probs(yes="high", no="low"),
}


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


class Feedback:
    """The feedback stage's roles without Ray and engines: a real judge over HTTP and a real recorder."""

    def __init__(self, folder: Path, service: Service) -> None:
        store = LocalStore()
        settings = {"base_url": service.url, "model": "m", "api_key_variable": None, "max_retries": 0, "timeout_s": 30}
        constitutions = {"train": write_constitution(folder)}
        self.worker = OpenAIJudgeWorker(EndpointConfig.model_validate(settings), constitutions, store, seed=1)
        self.recorder = RecorderWorker(folder / "run", store)

    async def generate(self, prompts: Sequence[Prompt], **_: Any) -> list[GroupHandle]:
        """Texts that are all different."""
        return [make_group(p.uid, [f"{p.uid}, text {k}" for k in range(SAMPLES)]) for p in prompts]

    async def judge(self, groups: Sequence[GroupHandle]) -> list[Judgement]:
        return await self.worker.judge(groups, "train")

    async def record_chunk(self, chunk: int, groups: Sequence[GroupHandle], judgements: Sequence[Judgement]) -> None:
        self.recorder.record_chunk(STAGE, chunk, groups, judgements, RankingConfig())

    async def has_chunk(self, chunk: int) -> bool:
        return self.recorder.has_chunk(STAGE, chunk)

    def run(self) -> None:
        """The label loop to its end; a run that is repeated leaves complete chunks alone."""

        async def go() -> None:
            await self.worker.start()
            try:
                async with asyncio.timeout(300):
                    roles = LabelRoles(self, self, self, OpenGate(), lambda kind, **fields: None)
                    prompts = [Prompt(f"p{index}", (), (1, 2, 3)) for index in range(PROMPTS)]
                    config = LabelConfig(num_samples=SAMPLES, prompts_per_chunk=CHUNK)
                    await label(roles, config, prompts, version=0, progress=lambda done: None)
            finally:
                await self.worker.stop()

        asyncio.run(go())


@pytest.mark.parametrize("fault", GARBAGE)
def test_nonsense_is_a_missing_verdict_and_ends_the_stage(
    fault: str, tmp_path: Path, service: Service, tell: Callable[..., None]
) -> None:
    """A judging service turns to nonsense behind the first chunk of the feedback stage, and comes back later.

    Passes if the stage ends with the typed error that counts all verdicts of the chunk as missing, nothing of that
    chunk is recorded, and the same stage later judges what is left: every text once, each value what the service said.
    """
    asked = 0
    sound = PROMPTS * SAMPLES // 2

    def behave(body: dict[str, Any], tries: int) -> tuple[int, Any]:
        nonlocal asked
        asked += 1
        return 200, completion(-0.5, -1.5) if asked <= sound else GARBAGE[fault]

    service.behave = behave
    feedback = Feedback(tmp_path, service)
    began = time.monotonic()
    with pytest.raises(MissingFeedbackError, match=rf"chunk 1: found {sound} of {sound} missing \(100%\)"):
        feedback.run()
    detect_s = time.monotonic() - began
    assert [feedback.recorder.has_chunk(STAGE, chunk) for chunk in (0, 1)] == [True, False]
    assert feedback.recorder.feedback_counts(STAGE)["num_verdicts"] == sound

    service.behave = lambda body, tries: (200, completion(-0.25, -2.25))
    began = time.monotonic()
    feedback.run()
    recover_s = time.monotonic() - began
    parts = feedback.recorder.parts("verdicts", STAGE)
    verdicts = [verdict for part in parts for verdict in feedback.recorder.read_verdicts(STAGE, part)]
    assert [verdict.value for verdict in verdicts] == [1.0] * sound + [2.0] * sound
    tell(f"the judge answers {fault}", detect_s=detect_s, recover_s=recover_s, lost_steps=0)
