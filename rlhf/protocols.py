"""The seams between loops and roles. Loops know these and nothing of Ray; tests hand them fakes.

Each docstring says who owns the object, how long it lives, what it may be asked twice, and what its failure looks like.
All calls that wait are coroutines; each implementation bounds its own wait and raises ``DeadlineError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from rlhf.runs.places import FileEntry, SaveStatus
from rlhf.types import GroupHandle, Judgement, Prompt, Score


class Generator(Protocol):
    """Draws completions. Owned by the runner; lives for one stage or for the run.

    A call admits all its prompts at once, in their order, each to the replica that order fixes. A replica that dies
    loses its unfinished prompts only: they are dispatched once more, by uid and seed. What fails a second replica too
    is dispatched a last time, prompt by prompt; one that fails a replica by itself is given up and has no group. Losses
    that go on raise ``EngineError``. Every completion comes from weights no older than ``version``, and no newer where
    ``exact``.
    """

    async def generate(
        self, prompts: Sequence[Prompt], *, num_samples: int, version: int, exact: bool = False
    ) -> list[GroupHandle]:
        """Returns one handle per prompt that was not given up, in the prompts' order, each with ``num_samples``."""
        ...


class RewardSource(Protocol):
    """Scores rollout groups: a reward model, a judge or rule functions. Stateless, so a call may be repeated.

    In the online loop a source holds the gate by itself, under the role that computes (see
    ``rlhf.loops.gate.GatedSource``): behind a mixture one role computes after the other.

    A completion that could not be scored comes back as ``Score(None, error=...)``; only the loss of the whole source
    raises (``ScorerError``), and that of the groups themselves (``RolloutsLostError``).
    """

    name: str

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """Returns, per group, one score per sibling."""
        ...


class Judge(Protocol):
    """Gives verdicts on rollout groups under a constitution. Stateless, so a call may be repeated.

    The verdicts themselves stay where the judge put them; what comes back says where, and what a loop has to know.
    A missing verdict is a ``Verdict`` with value None and its error; only the loss of the whole fleet raises
    (``JudgeError``), and that of the groups themselves (``RolloutsLostError``).
    """

    async def judge(self, groups: Sequence[GroupHandle]) -> list[Judgement]:
        """Returns, per group, where the verdicts on its siblings are."""
        ...


class Annotator(Protocol):
    """Adds per-token arrays (old and reference log-probs, values) to groups; the arrays stay in the object store.

    A call may be repeated; groups that are gone raise ``RolloutsLostError``.
    """

    async def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        """Returns the groups with more entries in ``annotations``, in the same order."""
        ...


class Learner(Protocol):
    """A gang of ranks that trains one model. Owned by the runner; restarts as a whole from a verified checkpoint.

    ``update`` is atomic: either every rank applied it, or ``LearnerError`` is raised and the gang is gone.
    Groups that are gone raise ``RolloutsLostError`` before any rank has begun: the gang lives, its weights are as they
    were. A non-finite gradient is not an error: all ranks skip together and the metrics say ``skipped = 1``.
    """

    async def update(self, groups: Sequence[GroupHandle]) -> Mapping[str, float]:
        """Trains on whole groups (all epochs and mini-batches of one step) and returns reduced scalars."""
        ...

    async def save(self, place: str) -> Mapping[str, FileEntry]:
        """Writes every rank's state (weights, optimizer, schedule, RNG) into an empty place; returns what it wrote.

        A place is a folder or a URL, see ``rlhf.runs.places``.
        """
        ...

    async def begin_save(self, place: str) -> None:
        """Copies that state to host memory, and returns while every rank writes its copy."""
        ...

    async def saved(self, wait_s: float = 0.0) -> SaveStatus:
        """What has come of ``begin_save``, after at most ``wait_s`` seconds; a full disk is no error here."""
        ...

    async def verify(self, place: str, files: Mapping[str, FileEntry]) -> str:
        """Checks the bytes that ``load`` will read against a manifest; what is wrong with them, or nothing."""
        ...

    async def load(self, place: str) -> None:
        """Restores what ``save`` wrote, on any number of ranks; ``verify`` has found nothing wrong with it."""
        ...

    async def export(self, directory: Path) -> None:
        """Writes the model in Hugging Face layout (adapters in PEFT layout), tokenizer included."""
        ...


class WeightPublisher(Protocol):
    """Copies the learner's weights to every generation replica under a version number.

    Returns only when each healthy replica serves ``version``; a replica that fails to take it stops serving
    (``PublicationError`` when none is left).
    """

    async def publish(self, version: int) -> Mapping[str, float]:
        """Returns scalars: seconds, bytes, buckets."""
        ...


class PhaseGate(Protocol):
    """Owns the device budget that roles acquire and release (all cores of a small machine, memory on shared GPUs).

    ``hold`` waits until the role's share is free. Deadlock is impossible as no role holds while it waits for another.
    """

    def hold(self, role: str) -> AbstractAsyncContextManager[None]:
        """A context in which ``role`` may compute."""
        ...


class Recorder(Protocol):
    """Keeps every sample, score, verdict and ranking; written by workers, never through the driver.

    A call may be repeated, and replaces what it wrote; groups that are gone raise ``RolloutsLostError``.
    """

    async def record(self, step: int, groups: Sequence[GroupHandle]) -> None:
        """Writes the groups with their scores and the verdicts behind these; returns when they are on disk."""
        ...
