"""The judge role: rollout groups in, verdicts and scores out.

``JudgeBase`` is what every judge does: fetch groups, put the constitution's questions, keep answers, make verdicts, and
put these into the store, from where the recorder takes them. A judge itself only answers questions. ``JudgeWorker``
answers from the label log-probabilities of a vLLM engine of its own; ``actors.judge_openai`` from those of a service.
"""

from __future__ import annotations

import asyncio
import dataclasses
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.control_tokens import encode_guarded
from actors.health import Probe, ProbedLoop
from actors.store import Store, fetch_all, fetch_payload
from actors.vllm.config import EngineConfig
from actors.vllm.engine import Request, VllmEngine
from actors.vllm.processes import Cores
from rlhf.errors import ConfigError, JudgeError
from rlhf.feedback.constitution import Constitution, ContentFreeCentre, load_constitution
from rlhf.feedback.labels import label_tokens
from rlhf.feedback.prompts import JudgeRequest, build_requests, content_free_request, prompt_text
from rlhf.feedback.shuffled import shuffle_verdicts
from rlhf.feedback.verdicts import cache_key, fixed_centre, label_margin, make_verdict
from rlhf.types import GroupHandle, Handle, Judgement, RolloutGroup, Score, Verdict

_MAX_CACHED = 200_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said to one question.

    Attributes:
        log_probs: Log-probability of each label as the continuation, in nats; None where there is no answer.
        error: Why there is none.
        num_tokens: Tokens of the question as the judge read it; 0 where it knew the answer, or a service does not say.
    """

    log_probs: Mapping[str, float] | None
    error: str = ""
    num_tokens: int = 0


class JudgeBase(ProbedLoop, ABC):
    """Judges rollout groups under named constitutions.

    Args:
        judge: Name of the judging model, for records and as part of the cache key.
        constitutions: Name -> constitution file.
        store: Where rollout groups are.
        seed: Draws the fences around judged texts.
        keep_answers: Whether a question that was answered in an earlier call is not asked again. An engine's last bits
            depend on what is asked together, so where runs are to repeat bit for bit, what a resumed judge has
            forgotten may not change its batches.
    """

    def __init__(
        self,
        judge: str,
        constitutions: Mapping[str, Path],
        store: Store,
        *,
        seed: int,
        keep_answers: bool = True,
    ) -> None:
        self._judge = judge
        self._files = dict(constitutions)
        self._store = store
        self._seed = seed
        self._keep_answers = keep_answers
        self._constitutions: dict[str, Constitution] = {}
        self._centres: dict[str, float] = {}
        self._cache: OrderedDict[str, Mapping[str, float]] = OrderedDict()

    async def start(self) -> None:
        """Reads the constitutions and makes the judge ready; a fault is found here, before anything is judged."""
        self._constitutions = {name: load_constitution(Path(file)) for name, file in self._files.items()}
        await self._open()
        for name, constitution in self._constitutions.items():
            self._check(name, constitution)

    @abstractmethod
    async def _open(self) -> None:
        """Gets ready to answer."""

    @abstractmethod
    def _check(self, name: str, constitution: Constitution) -> None:
        """Raises ``ConfigError`` where this judge cannot judge under the constitution."""

    @abstractmethod
    async def _ask(self, requests: Sequence[JudgeRequest]) -> list[Answer]:
        """Answers questions, one answer each in their order."""

    @abstractmethod
    async def stop(self) -> None:
        """Gives everything back that ``start`` took."""

    async def judge(self, groups: Sequence[GroupHandle], constitution: str, shuffled: bool = False) -> list[Judgement]:
        """Puts the verdicts on each group into the store, and returns where they are with what a loop has to know.

        Args:
            groups: What is judged.
            constitution: Which one.
            shuffled: Deal the verdicts out at random among siblings: the null arm.
        """
        rows = await self._verdicts(groups, constitution)
        if shuffled:
            rows = [(shuffle_verdicts(verdicts, self._seed), num_tokens) for verdicts, num_tokens in rows]
        stored = await asyncio.gather(*(asyncio.to_thread(self._put, verdicts) for verdicts, _ in rows))
        return [
            _judgement(group, handle, verdicts, num_tokens)
            for group, [handle], (verdicts, num_tokens) in zip(groups, stored, rows, strict=True)
        ]

    async def verdicts(self, groups: Sequence[GroupHandle], constitution: str) -> list[tuple[Verdict, ...]]:
        """Returns, per group, the verdicts on its siblings (pointwise) or on both orders of each pair (pairwise)."""
        return [verdicts for verdicts, _ in await self._verdicts(groups, constitution)]

    def _put(self, verdicts: tuple[Verdict, ...]) -> list[Handle]:
        return [self._store.put(verdicts)]

    async def _verdicts(
        self, groups: Sequence[GroupHandle], constitution: str
    ) -> list[tuple[tuple[Verdict, ...], int]]:
        """The verdicts on each group, and the tokens that were read for them."""
        rules = self._named(constitution)
        centre = await self._centre(constitution, rules)
        payloads = await asyncio.to_thread(fetch_all, groups, self._store, fetch_payload, where=self._judge)
        questions = [build_requests(rules, payload, seed=self._seed) for payload in payloads]
        signs = [rules.sign_of(payload.prompt) for payload in payloads]
        answers = await self._answers(rules, payloads, questions)
        verdicts = [
            tuple(
                make_verdict(
                    rules, request, said.log_probs, sign=sign, centre=centre, judge=self._judge, error=said.error
                )
                for request, said in zip(asked, answered, strict=True)
            )
            for asked, answered, sign in zip(questions, answers, signs, strict=True)
        ]
        return [
            (given, sum(said.num_tokens for said in answered))
            for given, answered in zip(verdicts, answers, strict=True)
        ]

    def _named(self, name: str) -> Constitution:
        if name not in self._constitutions:
            raise ConfigError(
                f"{self._judge}: constitution",
                found=repr(name),
                needed=f"one of {sorted(self._constitutions)} of a started judge",
                action="Name a constitution of the judge section.",
            )
        return self._constitutions[name]

    async def _centre(self, name: str, rules: Constitution) -> float:
        fixed = fixed_centre(rules)
        if fixed is not None:
            return fixed
        if name not in self._centres:
            assert isinstance(rules.config.centre, ContentFreeCentre)
            request = content_free_request(rules, rules.config.centre.content_free, seed=self._seed)
            answer = (await self._ask([request]))[0]
            if answer.log_probs is None:
                raise JudgeError(
                    f"{self._judge} under {name}: centre",
                    found=answer.error,
                    needed="the judge's margin for a text that says nothing",
                    action="See why the judge does not answer, or give the centre as a number.",
                )
            self._centres[name] = label_margin(answer.log_probs, request.labels)
        return self._centres[name]

    async def _answers(
        self, rules: Constitution, payloads: Sequence[RolloutGroup], questions: Sequence[Sequence[JudgeRequest]]
    ) -> list[list[Answer]]:
        """Answers from the cache where it can; equal questions are asked once. Only real answers are kept.

        The tokens of a question stand with the first of those that asked it.
        """
        keys = [
            [self._key(rules, payload, request) for request in asked]
            for payload, asked in zip(payloads, questions, strict=True)
        ]
        fresh: dict[str, JudgeRequest] = {}
        known: dict[str, Answer] = {}
        for row, asked in zip(keys, questions, strict=True):
            for key, request in zip(row, asked, strict=True):
                if key in self._cache:
                    self._cache.move_to_end(key)
                    known[key] = Answer(self._cache[key])
                else:
                    fresh.setdefault(key, request)
        with self.at_work():
            answered = await self._ask(list(fresh.values()))
        for key, answer in zip(fresh, answered, strict=True):
            known[key] = answer
            if answer.log_probs is not None and self._keep_answers:
                self._cache[key] = answer.log_probs
        while len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        answers: list[list[Answer]] = []
        for row in keys:
            answers.append([])
            for key in row:
                answers[-1].append(known[key])
                known[key] = dataclasses.replace(known[key], num_tokens=0)
        return answers

    def _key(self, rules: Constitution, payload: RolloutGroup, request: JudgeRequest) -> str:
        texts = [payload.rollouts[k].completion.text for k in request.samples]
        return cache_key(self._judge, rules, prompt_text(payload.prompt), texts)


def _judgement(group: GroupHandle, handle: Handle, verdicts: Sequence[Verdict], num_tokens: int) -> Judgement:
    scores = [_score(k, verdicts) for k in range(len(group.completion_lengths))]
    return Judgement(
        uid=group.uid,
        verdicts=handle,
        scores=tuple(dataclasses.replace(score, evidence=(handle,)) for score in scores),
        num_verdicts=len(verdicts),
        errors=tuple(verdict.error for verdict in verdicts if verdict.value is None),
        num_tokens=num_tokens,
    )


def _score(sibling: int, verdicts: Sequence[Verdict]) -> Score:
    """The sibling's own verdict, or the mean over its pairs: a verdict on (first, second) speaks for the first."""
    about = [verdict for verdict in verdicts if sibling in verdict.samples]
    values = [
        verdict.value if verdict.samples[0] == sibling else -verdict.value
        for verdict in about
        if verdict.value is not None
    ]
    if not values:
        errors = sorted({verdict.error for verdict in about if verdict.error})
        return Score(None, error="; ".join(errors) or "no verdict on this completion")
    value = sum(values) / len(values)
    return Score(value, components={"judge": value})


class JudgeWorker(JudgeBase):
    """One replica of the judge fleet: label log-probabilities from a vLLM engine.

    Args:
        model: Folder in Hugging Face layout.
        engine: How vLLM is started.
        constitutions: Name -> constitution file.
        store: Where rollout groups are.
        seed: Draws the fences around judged texts.
        cores: Which cores, or how many threads, the engine may use.
        name: The judge's name in records; its folder's where empty.
    """

    def __init__(
        self,
        model: Path,
        engine: EngineConfig,
        constitutions: Mapping[str, Path],
        store: Store,
        *,
        seed: int,
        cores: Cores | None = None,
        name: str = "",
    ) -> None:
        super().__init__(name or Path(model).name, constitutions, store, seed=seed, keep_answers=False)
        self._model = Path(model)
        self._max_model_len = engine.max_model_len
        self._engine = VllmEngine(model, engine, cores=cores, name=f"judge {self._judge}", role="judge")
        self._tokenizer: Any = None
        self._label_ids: dict[tuple[str, str], tuple[int, int]] = {}

    async def _open(self) -> None:
        from transformers import AutoTokenizer

        await self._engine.start()
        self._tokenizer = await asyncio.to_thread(AutoTokenizer.from_pretrained, self._model, trust_remote_code=False)

    def _check(self, name: str, constitution: Constitution) -> None:
        """Each label has to be one token after the judge's text, and the two have to differ."""
        ids = label_tokens(self._tokenizer, constitution, name=name, judge=self._judge, seed=self._seed)
        labels = constitution.config.labels
        self._label_ids[labels.positive, labels.negative] = ids

    async def _ask(self, requests: Sequence[JudgeRequest]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        by_labels: dict[tuple[str, str], list[tuple[int, Request]]] = {}
        for index, request in enumerate(requests):
            ids = tuple(encode_guarded(self._tokenizer, request.text, request.foreign))
            if len(ids) >= self._max_model_len:
                error = f"the judge's text has {len(ids)} tokens and its context is {self._max_model_len}"
                answers[index] = Answer(None, error)
                continue
            by_labels.setdefault(request.labels, []).append((index, Request(request.uid, ids)))
        for labels, asked in by_labels.items():
            rows = await self._engine.label_log_probs([request for _, request in asked], self._label_ids[labels])
            for (index, question), row in zip(asked, rows, strict=True):
                log_probs = dict(zip(labels, row, strict=True))
                answers[index] = Answer(log_probs, num_tokens=len(question.prompt_ids))
        return [answers[index] for index in range(len(requests))]

    async def probe(self) -> Probe:
        """Asks the engine too; see ``GenerationWorker.probe``."""
        return await self._engine.probe(self)

    async def abandon(self) -> None:
        """Gives up what a driver that is gone had asked for."""
        await self._engine.abandon("its driver is gone", serve=True)

    async def reside(self, parts: Sequence[str]) -> None:
        """Keeps these parts (``weights``, ``kv_cache``) in GPU memory, where the engine section allows it to sleep."""
        await self._engine.reside(parts)

    async def stop(self) -> None:
        """Ends the engine and its processes."""
        await self._engine.stop()
