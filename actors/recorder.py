"""The recorder: writes what the other roles made, straight from the object store to parquet.

One recorder serves the run. It also owns the objects that other workers put (see ``actors.store``), so a rollout
outlives the replica that drew it. What it owns goes with its process, which Ray starts again: see
``actors.remote_recorder``. What it had to know is in the files, so each of its methods may be called again.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from actors.health import ProbedThread
from actors.store import Store, evidence_of, fetch_all, fetch_payload
from rlhf.data.groups import groups_from_feedback, write_groups
from rlhf.data.preferences import PreferenceDataConfig, feedback_groups, load_people_feedback
from rlhf.errors import DeadlineError
from rlhf.evaluation.text import measure_texts
from rlhf.feedback.rankings import RankingConfig, ranking_from_verdicts
from rlhf.runs import names, tables
from rlhf.types import (
    Completion,
    GroupHandle,
    Handle,
    Judgement,
    Prompt,
    Ranking,
    Rollout,
    RolloutGroup,
    TrainGroup,
    Verdict,
)


def pointwise_scores(num_samples: int, verdicts: Sequence[Verdict]) -> list[float | None]:
    """Each sibling's value from verdicts on single completions; None where there is none (pairwise). Shape [K]."""
    scores: list[float | None] = [None] * num_samples
    for verdict in verdicts:
        if len(verdict.samples) == 1:
            scores[verdict.samples[0]] = verdict.value
    return scores


def people_group(prompt: Prompt, texts: Sequence[str], group: TrainGroup) -> RolloutGroup:
    """Completions that people wrote or chose as rollouts without log-probs and weight versions: no engine drew them."""
    nothing = np.zeros(0, np.float32)
    completions = [
        Completion(token_ids=ids, log_probs=nothing, text=text, finish_reason="stop", version_spans=())
        for ids, text in zip(group.completion_ids, texts, strict=True)
    ]
    return RolloutGroup(prompt, tuple(Rollout(completion) for completion in completions))


P = ParamSpec("P")
T = TypeVar("T")

ABANDON_TIMEOUT_S = 100.0
"""Longest wait for writes that are under way; they take seconds."""


def _write(method: Callable[Concatenate[RecorderWorker, P], T]) -> Callable[Concatenate[RecorderWorker, P], T]:
    """A method that writes: ``abandon`` waits for its end."""

    @functools.wraps(method)
    def counted(self: RecorderWorker, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._writes:
            self._num_writing += 1
        try:
            return method(self, *args, **kwargs)
        finally:
            with self._writes:
                self._num_writing -= 1
                self._writes.notify_all()

    return counted


class RecorderWorker(ProbedThread):
    """Writes and reads the tables of one run directory. Every file is there whole or not at all.

    Args:
        run: The run directory.
        store: Where the rollout groups live.
    """

    def __init__(self, run: Path, store: Store) -> None:
        self._run = Path(run)
        self._store = store
        self._writes = threading.Condition()
        self._num_writing = 0
        self._process = uuid.uuid4().hex

    def abandon(self) -> None:
        """Returns when nothing is written any more that a driver which is gone had asked for.

        What the next driver writes in its place comes after it then, and stays.

        Raises:
            DeadlineError: A write did not end.
        """
        with self._writes:
            if not self._writes.wait_for(lambda: not self._num_writing, ABANDON_TIMEOUT_S):
                raise DeadlineError(
                    f"recorder of {self._run}",
                    found=f"{self._num_writing} writes under way after {ABANDON_TIMEOUT_S:.0f} s",
                    needed="their end",
                    action="Look at the file system of the run directory.",
                )

    def ping(self) -> str:
        """Answers with a name of this process; one that was restarted has another, and nothing of what it owned."""
        return self._process

    def keep(self, value: Any) -> list[Handle]:
        """Puts a value for another worker and owns it from now on.

        Returns:
            The handle, in a list: a bare handle would be resolved to its value on the way back.
        """
        return [self._store.put(value)]

    @_write
    def record(self, stage: str, step: int, groups: Sequence[GroupHandle]) -> int:
        """Writes the rollouts of one step of the online loop with their scores and verdicts; returns the rollouts.

        A step that is done again after a resume replaces its own files.
        """
        return self._write_scored(stage, names.step_part(step), groups, step)

    @_write
    def record_validation(
        self, stage: str, num_updates: int, groups: Sequence[GroupHandle], subject_field: str, keywords_field: str
    ) -> dict[str, float]:
        """Writes the samples of a validation with their scores and verdicts.

        Args:
            stage: Whose validation it is.
            num_updates: Updates done before it.
            groups: The samples.
            subject_field: Data column that names what a text has to be about.
            keywords_field: Data column with stems that show that it is.

        Returns:
            ``rlhf.evaluation.text.measure_texts`` of all of them.
        """
        self._write_scored(stage, names.validation_part(num_updates), groups, num_updates)
        texts, subjects = [], []
        for group in self._groups(groups):
            fields = group.prompt.fields
            texts += [rollout.completion.text for rollout in group.rollouts]
            subjects += [(fields.get(subject_field, ""), fields.get(keywords_field, ""))] * len(group.rollouts)
        return measure_texts(texts, subjects)

    def record_groups(self, stage: str, part: str, groups: Sequence[GroupHandle], step: int | None = None) -> int:
        """Writes rollouts with their scores; returns the number of rows."""
        rows = []
        for handle, group in zip(groups, self._groups(groups), strict=True):
            rows += tables.rollout_rows(group, handle.scores, step)
        tables.write_part(self._run, "rollouts", stage, part, rows)
        return len(rows)

    def record_verdicts(
        self, stage: str, part: str, groups: Sequence[GroupHandle], verdicts: Sequence[Sequence[Verdict]]
    ) -> int:
        """Writes the verdicts on groups, one sequence per group, with the texts judged; returns the number of rows."""
        rows = []
        for group, given in zip(self._groups(groups), verdicts, strict=True):
            rows += tables.verdict_rows(group, given)
        tables.write_part(self._run, "verdicts", stage, part, rows)
        return len(rows)

    def record_rankings(self, stage: str, part: str, rankings: Sequence[Ranking]) -> int:
        """Writes rankings; returns their number."""
        tables.write_part(self._run, "rankings", stage, part, tables.ranking_rows(rankings))
        return len(rankings)

    @_write
    def record_chunk(
        self,
        stage: str,
        chunk: int,
        groups: Sequence[GroupHandle],
        judgements: Sequence[Judgement],
        ranking: RankingConfig,
    ) -> None:
        """Ranks and writes one chunk of the feedback stage; its training groups come last: then it is complete."""
        part = names.chunk_part(chunk)
        scored = [
            dataclasses.replace(group, scores=judgement.scores)
            for group, judgement in zip(groups, judgements, strict=True)
        ]
        verdicts = fetch_all(scored, self._store, evidence_of, where="recorder")
        rankings = [
            ranking_from_verdicts(group.uid, len(group.completion_lengths), given, ranking, source="judge")
            for group, given in zip(groups, verdicts, strict=True)
        ]
        self.record_groups(stage, part, scored)
        self.record_verdicts(stage, part, groups, verdicts)
        self.record_rankings(stage, part, rankings)
        scores = [
            pointwise_scores(len(ranking.ranks), given) for ranking, given in zip(rankings, verdicts, strict=True)
        ]
        trained = groups_from_feedback(self._groups(groups), rankings, scores)
        write_groups(self._path("groups", stage, part), trained)

    @_write
    def import_people_feedback(self, stage: str, config: PreferenceDataConfig, model: Path, max_tokens: int) -> int:
        """Turns a file of people's pairs, ranked lists or ratings into what the feedback stage leaves.

        Args:
            stage: The feedback stage's name.
            config: Which file and how.
            model: Folder of the model to train; its tokenizer is used.
            max_tokens: Longest prompt and completion together.

        Returns:
            Number of rankings.

        Raises:
            DataError: A fault in the file, with its line.
        """
        from rlhf.models.load import load_tokenizer  # transformers, which no other method needs

        tokenizer = load_tokenizer(str(model))
        feedback = load_people_feedback(config, tokenizer, max_tokens)
        groups = feedback_groups(feedback, tokenizer)
        part = names.chunk_part(0)
        rows = []
        for item, group in zip(feedback, groups, strict=True):
            rows += tables.rollout_rows(people_group(item.prompt, item.completions, group), (), None)
        tables.write_part(self._run, "rollouts", stage, part, rows)
        self.record_rankings(stage, part, [item.ranking for item in feedback])
        write_groups(self._path("groups", stage, part), groups)
        return len(feedback)

    def has_chunk(self, stage: str, chunk: int) -> bool:
        """Whether ``record_chunk`` came to its end for this chunk."""
        return self._path("groups", stage, names.chunk_part(chunk)).is_file()

    def feedback_counts(self, stage: str) -> dict[str, float]:
        """Verdicts asked for, the fraction that is missing, and prompts with a ranking, over all chunks."""
        verdicts = [verdict for part in self.parts("verdicts", stage) for verdict in self.read_verdicts(stage, part)]
        missing = sum(verdict.value is None for verdict in verdicts)
        return {
            "num_verdicts": len(verdicts),
            "missing_fraction": missing / max(len(verdicts), 1),
            "num_rankings": sum(
                any(rank is not None for rank in ranking.ranks) for ranking in self.feedback_rankings(stage)
            ),
        }

    def feedback_rankings(self, stage: str) -> list[Ranking]:
        """All rankings of the feedback stage, in the order in which its prompts were labelled."""
        return [ranking for part in self.parts("rankings", stage) for ranking in self.read_rankings(stage, part)]

    def put_rankings(self, stage: str, uids: Collection[str] | None = None) -> list[Handle]:
        """Puts the feedback stage's rankings, or those of some prompts, into the store; their handle, in a list."""
        rankings = self.feedback_rankings(stage)
        return [self._store.put([ranking for ranking in rankings if uids is None or ranking.uid in uids])]

    def feedback_groups(self, stage: str) -> list[GroupHandle]:
        """All groups of the feedback stage, back in the store."""
        return [handle for part in self.parts("rollouts", stage) for handle in self.read_groups(stage, part)]

    def read_groups(self, stage: str, part: str) -> list[GroupHandle]:
        """Puts recorded groups back into the store, scores included, and returns their handles in the file's order."""
        rows = tables.read_table(self._path("rollouts", stage, part))
        return [self._handle(group) for group in tables.groups_from_rows(rows)]

    def read_verdicts(self, stage: str, part: str) -> list[Verdict]:
        """Returns recorded verdicts in the file's order."""
        return tables.verdicts_from_rows(tables.read_table(self._path("verdicts", stage, part)))

    def read_rankings(self, stage: str, part: str) -> list[Ranking]:
        """Returns recorded rankings in the file's order."""
        return tables.rankings_from_rows(tables.read_table(self._path("rankings", stage, part)))

    def parts(self, kind: str, stage: str) -> list[str]:
        """The parts of a stage's table (``"rollouts"``, ``"verdicts"``, ``"rankings"``, ``"groups"``), sorted."""
        files = self._path(kind, stage, "x").parent.glob(f"{stage}.*.parquet")
        return sorted(file.name.removeprefix(f"{stage}.").removesuffix(".parquet") for file in files)

    def _write_scored(self, stage: str, part: str, groups: Sequence[GroupHandle], step: int) -> int:
        """Verdicts first: once the rollouts are there, all of it is."""
        if any(score.evidence for group in groups for score in group.scores):
            self.record_verdicts(stage, part, groups, fetch_all(groups, self._store, evidence_of, where="recorder"))
        return self.record_groups(stage, part, groups, step)

    def _groups(self, handles: Sequence[GroupHandle]) -> list[RolloutGroup]:
        return fetch_all(handles, self._store, fetch_payload, where="recorder")

    def _handle(self, group: RolloutGroup) -> GroupHandle:
        versions = [span.version for r in group.rollouts for span in r.completion.version_spans]
        scores = tuple(r.score for r in group.rollouts if r.score is not None)
        return GroupHandle(
            uid=group.prompt.uid,
            payload=self._store.put(group),
            prompt_length=len(group.prompt.token_ids),
            completion_lengths=tuple(len(r.completion.token_ids) for r in group.rollouts),
            weight_versions=(min(versions, default=0), max(versions, default=0)),
            scores=scores if len(scores) == len(group.rollouts) else (),
        )

    def _path(self, kind: str, stage: str, part: str) -> Path:
        return tables.part_path(self._run, kind, stage, part)
