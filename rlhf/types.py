"""The nouns that travel between roles: frozen, slotted, documented by shape.

Legend for shapes: B packed rows, S tokens in a row, N sequences, T completion tokens, K siblings of one prompt,
V vocabulary. Token arrays are numpy, so that the object store shares them between processes without copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]

Handle = Any
"""Where a value lives: a ``ray.ObjectRef`` in a cluster, the value itself in tests without Ray."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, for example ``Message("user", "Write a review of ...")``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a completion answers.

    Attributes:
        uid: Unique within a run; names the prompt in every record, for example ``"train/00012"``.
        messages: The conversation up to the answer.
        token_ids: The conversation rendered by the chat template, generation prompt included. [P]
        fields: The data row's own columns, for example ``{"request": "scathing", "subject": "a heist"}``; slices of
            the evaluation and the sign of a verdict come from here.
    """

    uid: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Completion tokens ``start`` to ``end`` (end excluded) were drawn from weights ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer as the engine gave it.

    Attributes:
        token_ids: End-of-text included where the engine stopped there. [T]
        log_probs: Log-probability of each token under the generating engine and its sampling temperature. [T]
        text: The decoded answer, special tokens left out.
        finish_reason: ``"stop"`` (end-of-text) or ``"length"`` (the token limit).
        version_spans: Which weights drew which tokens; one span unless weights changed in flight.
    """

    token_ids: TokenArray
    log_probs: FloatArray
    text: str
    finish_reason: str
    version_spans: tuple[VersionSpan, ...]


class RolloutStatus(StrEnum):
    """What became of one rollout."""

    PENDING = "pending"
    SCORED = "scored"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Score:
    """What one reward source said of one completion.

    Attributes:
        value: The score, or None where the source failed: a failure is never a number.
        components: Named parts, for example ``{"reward_model": 1.2, "length": -0.1}``.
        error: Why the value is missing; empty where there is one.
        evidence: Handles of the verdicts behind it, each a tuple of ``Verdict``: for the record, which is not written
            through whoever passes the score on.
    """

    value: float | None
    components: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    evidence: tuple[Handle, ...] = ()

    @property
    def status(self) -> RolloutStatus:
        """``SCORED`` where there is a value, ``MISSING`` otherwise."""
        return RolloutStatus.MISSING if self.value is None else RolloutStatus.SCORED


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion and its score (None until scored)."""

    completion: Completion
    score: Score | None = None


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The K siblings of one prompt: what lives in the object store."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class GroupHandle:
    """What the driver knows of a rollout group: where it lives, and scalars.

    Attributes:
        uid: The prompt's uid.
        payload: Handle of the ``RolloutGroup``.
        prompt_length: Tokens of the prompt.
        completion_lengths: Tokens of each sibling. [K]
        weight_versions: Oldest and newest weight version that drew any token of the group.
        scores: One per sibling; empty until scored. [K]
        annotations: Handles of per-token arrays that other roles computed, by name (``"reference_log_probs"``,
            ``"old_log_probs"``, ``"values"``); each resolves to a tuple of K float32 arrays [T_k].
    """

    uid: str
    payload: Handle
    prompt_length: int
    completion_lengths: tuple[int, ...]
    weight_versions: tuple[int, int]
    scores: tuple[Score, ...] = ()
    annotations: Mapping[str, Handle] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all siblings."""
        return self.prompt_length + sum(self.completion_lengths)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgement of one completion (pointwise) or of two (pairwise).

    Attributes:
        uid: The prompt's uid.
        samples: The sibling indices that were judged: ``(k,)`` or ``(first, second)`` in the order shown.
        value: Pointwise: the margin towards what was asked. Pairwise: log-odds that the first is better. None where
            no verdict could be had.
        reason: What the judge said, or the label log-probs in words.
        judge: Model and constitution that judged, for the record.
        error: Why the value is missing; empty where there is one.
    """

    uid: str
    samples: tuple[int, ...]
    value: float | None
    reason: str = ""
    judge: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the driver knows of a judge's verdicts on one rollout group: where they live, and scalars.

    Attributes:
        uid: The prompt's uid.
        verdicts: Handle of the tuple of ``Verdict``, with their reasons.
        scores: One per sibling: its own verdict's value, or the mean over its pairs. [K]
        num_verdicts: Verdicts asked for.
        errors: Why each missing one is missing.
        num_tokens: Tokens that the judge read for them; 0 where it knew the answers, or a service does not say.
    """

    uid: str
    verdicts: Handle
    scores: tuple[Score, ...]
    num_verdicts: int
    errors: tuple[str, ...] = ()
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order of the K siblings of one prompt.

    Attributes:
        uid: The prompt's uid.
        ranks: 1 is best; equal ranks are ties; None means no verdict. ``(2, 1, 2, None)``. [K]
        source: ``"judge"``, ``"people"`` or the name of another source.
    """

    uid: str
    ranks: tuple[int | None, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class TrainGroup:
    """One prompt and its K completions as a learner rank sees them, whatever the objective.

    Attributes:
        uid: The prompt's uid.
        prompt_ids: [P]
        completion_ids: K arrays [T_k]. Supervised records have K = 1, preference pairs K = 2 (chosen first).
        ranks: For the rank loss: lower is better, NaN is missing. [K]
        scores: For policy and value objectives: NaN is missing. [K]
        behaviour_log_probs: From the generating engine. K arrays [T_k]
        reference_log_probs: From the frozen reference. K arrays [T_k]
        old_log_probs: From the policy at the start of the step. K arrays [T_k]
        values: From the critic. K arrays [T_k]
        loss_masks: True where a completion token is trained on; absent means every token. K arrays [T_k]
        cluster: What the prompt shares with others, such as its subject: groups of one cluster are held out together
            and resampled together. Empty: it stands alone.
    """

    uid: str
    prompt_ids: TokenArray
    completion_ids: tuple[TokenArray, ...]
    ranks: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    behaviour_log_probs: tuple[FloatArray, ...] | None = None
    reference_log_probs: tuple[FloatArray, ...] | None = None
    old_log_probs: tuple[FloatArray, ...] | None = None
    values: tuple[FloatArray, ...] | None = None
    loss_masks: tuple[NDArray[np.bool_], ...] | None = None
    cluster: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all completions."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))
