"""What a judge reads: the constitution's template around texts that count as data, never as instructions.

Every text to judge stands inside a fence: a word that is drawn anew for each prompt, cannot be guessed by whoever wrote
the text and occurs in none of the texts shown. It follows from a seed, so a repeated run shows the judge the same text.
The siblings of one prompt share a fence, so that the fence cannot order them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

from rlhf.feedback.constitution import Constitution, fill_and_locate
from rlhf.types import Prompt, RolloutGroup

_FENCE_LENGTH = 12  # letters, 4.3 bits each
_LETTERS = "bcdfghjklmnpqrstvwxz"


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One question to a judge; the answer is the log-probability of each label as the text's continuation.

    Attributes:
        uid: The prompt's uid.
        samples: The siblings shown, ``(k,)`` or ``(first, second)``.
        text: All that the judge reads; ends where the label comes.
        labels: The two continuations to score, positive first.
        note: What the record should say about the text, such as a cut; mostly empty.
        foreign: Where in ``text`` stands what others wrote (the prompt and the texts to judge): first character and
            end (excluded) of each. Nothing in there may act as one of the judge's control tokens.
    """

    uid: str
    samples: tuple[int, ...]
    text: str
    labels: tuple[str, str]
    note: str = ""
    foreign: tuple[tuple[int, int], ...] = ()


def build_requests(constitution: Constitution, group: RolloutGroup, *, seed: int) -> list[JudgeRequest]:
    """Returns the questions about one group: K (pointwise), or both orders of every pair, K(K-1) (pairwise)."""
    texts = [rollout.completion.text for rollout in group.rollouts]
    return requests_for_texts(constitution, group.prompt, texts, seed=seed)


def requests_for_texts(
    constitution: Constitution, prompt: Prompt, texts: Sequence[str], *, seed: int
) -> list[JudgeRequest]:
    """Returns the questions about several answers to one prompt, in a fixed order.

    Args:
        constitution: Says how to ask.
        prompt: What the texts answer.
        texts: The siblings' texts. [K]
        seed: Draws the fence, together with the prompt.
    """
    question = prompt_text(prompt)
    fence = draw_fence(seed, question, [question, *texts])
    size = 1 if constitution.config.mode == "pointwise" else 2
    labels = constitution.config.labels
    requests = []
    for samples in permutations(range(len(texts)), size):
        shown, note = _cut([texts[index] for index in samples], samples, constitution.config.max_characters)
        text, foreign = judge_text(constitution, question, shown, fence)
        requests.append(JudgeRequest(prompt.uid, samples, text, (labels.positive, labels.negative), note, foreign))
    return requests


def content_free_request(constitution: Constitution, text: str, *, seed: int) -> JudgeRequest:
    """Returns the question about a text that says nothing; its margin is the judge's zero.

    In pairwise mode both sides show the text, so the margin is the judge's liking for the first place.
    """
    size = 1 if constitution.config.mode == "pointwise" else 2
    labels = constitution.config.labels
    fence = draw_fence(seed, "", [text])
    shown, foreign = judge_text(constitution, "", [text] * size, fence)
    names = (labels.positive, labels.negative)
    return JudgeRequest("content-free", tuple(range(size)), shown, names, foreign=foreign)


def judge_text(
    constitution: Constitution, question: str, texts: Sequence[str], fence: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the whole text for one judgement, and where in it prompt and texts stand (``JudgeRequest.foreign``).

    Header, worked examples, then the case without its label.

    Each example has a fence of its own that never changes: an engine computes the prefix of all judgements once.
    """
    labels = {"positive": constitution.config.labels.positive, "negative": constitution.config.labels.negative}
    parts = [constitution.header] if constitution.header else []
    for index, example in enumerate(constitution.config.examples):
        shown = [example.text.strip(), example.other.strip()]
        own = draw_fence(index, "example", [*shown, example.prompt])
        parts.append(_case(constitution, example.prompt, shown, own)[0] + labels[example.label])
    case, places = _case(constitution, question, texts, fence)
    text = "\n\n".join([*parts, case])
    start = len(text) - len(case)
    return text, tuple((start + first, start + end) for slot, first, end in places if slot != "fence")


def prompt_text(prompt: Prompt) -> str:
    """Returns the conversation in words: a single user turn as it is, several turns with their roles."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


def draw_fence(seed: int, name: str, texts: Iterable[str]) -> str:
    """Returns a word that occurs in none of ``texts`` (upper or lower case), always the same for the same arguments."""
    everything = "\n".join(texts).casefold()
    attempt = 0
    while True:
        digest = hashlib.blake2b(f"{seed}\x00{attempt}\x00{name}".encode(), digest_size=16).digest()
        number = int.from_bytes(digest, "big")
        letters = []
        for _ in range(_FENCE_LENGTH):
            number, index = divmod(number, len(_LETTERS))
            letters.append(_LETTERS[index])
        fence = "".join(letters)
        if fence not in everything:
            return fence
        attempt += 1


def _case(
    constitution: Constitution, question: str, texts: Sequence[str], fence: str
) -> tuple[str, list[tuple[str, int, int]]]:
    values = {"fence": fence, "prompt": question, "completion": texts[0], "first": texts[0], "second": texts[-1]}
    return fill_and_locate(constitution.case, values)


def _cut(texts: list[str], samples: Sequence[int], limit: int) -> tuple[list[str], str]:
    notes = [
        f"sample {sample} cut to {limit} of {len(text)} characters"
        for sample, text in zip(samples, texts, strict=True)
        if len(text) > limit
    ]
    return [text.strip()[:limit] for text in texts], "; ".join(notes)
