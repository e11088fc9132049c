"""The recorder: writes what the other roles made, straight from the object store to parquet.

One recorder lives as long as the run. It also owns the objects that other workers put (see ``actors.store``), so a
rollout outlives the replica that drew it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.store import Store, fetch_all, fetch_payload
from rlhf.data.groups import groups_from_feedback, write_groups
from rlhf.data.preferences import PreferenceDataConfig, feedback_groups, load_people_feedback
from rlhf.errors import RecordError
from rlhf.evaluation.completions import EvalCompletion, to_wide
from rlhf.evaluation.text import measure_texts
from rlhf.runs import tables
from rlhf.types import (
    Completion,
    GroupHandle,
    Handle,
    Prompt,
    Ranking,
    Rollout,
    RolloutGroup,
    TrainGroup,
    Verdict,
)

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_\-]*$")


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


class RecorderWorker:
    """Writes and reads the tables of one run directory. Every file is there whole or not at all.

    Args:
        run: The run directory.
        store: Where the rollout groups live.
    """

    def __init__(self, run: Path, store: Store) -> None:
        self._run = Path(run)
        self._store = store

    def ping(self) -> bool:
        """Answers; a caller that waits for it knows that the recorder is up."""
        return True

    def keep(self, value: Any) -> list[Handle]:
        """Puts a value for another worker and owns it from now on.

        Returns:
            The handle, in a list: a bare handle would be resolved to its value on the way back.
        """
        return [self._store.put(value)]

    def record(self, step: int, groups: Sequence[GroupHandle]) -> int:
        """Writes the rollouts of one step of the online loop with their scores; returns the number of rows.

        A step that is done again after a resume replaces its own file.
        """
        return self._write_groups(f"step_{step:06d}", groups, step)

    def record_validation(
        self, num_updates: int, groups: Sequence[GroupHandle], subject_field: str, keywords_field: str
    ) -> dict[str, float]:
        """Writes the samples of a validation with their scores.

        Args:
            num_updates: Updates done before it.
            groups: The samples.
            subject_field: Data column that names what a text has to be about.
            keywords_field: Data column with stems that show that it is.

        Returns:
            ``rlhf.evaluation.text.measure_texts`` of all of them.
        """
        self._write_groups(f"validation_{num_updates:06d}", groups, num_updates)
        texts, subjects = [], []
        for group in self._groups(groups):
            fields = group.prompt.fields
            texts += [rollout.completion.text for rollout in group.rollouts]
            subjects += [(fields.get(subject_field, ""), fields.get(keywords_field, ""))] * len(group.rollouts)
        return measure_texts(texts, subjects)

    def record_groups(self, name: str, groups: Sequence[GroupHandle]) -> int:
        """Writes rollouts that belong to no step, for example of the feedback stage."""
        return self._write_groups(name, groups, None)

    def record_verdicts(self, name: str, groups: Sequence[GroupHandle], verdicts: Sequence[Sequence[Verdict]]) -> int:
        """Writes the verdicts on groups, one sequence per group, with the texts judged; returns the number of rows."""
        rows = []
        for group, given in zip(self._groups(groups), verdicts, strict=True):
            rows += tables.verdict_rows(group, given)
        tables.write_table(self._path("verdicts", name), rows, tables.VERDICTS)
        return len(rows)

    def record_rankings(self, name: str, rankings: Sequence[Ranking]) -> int:
        """Writes rankings; returns their number."""
        tables.write_table(self._path("rankings", name), tables.ranking_rows(rankings), tables.RANKINGS)
        return len(rankings)

    def record_chunk(
        self,
        chunk: int,
        groups: Sequence[GroupHandle],
        verdicts: Sequence[Sequence[Verdict]],
        rankings: Sequence[Ranking],
    ) -> None:
        """Writes one chunk of the feedback stage; its training groups come last and say that the chunk is complete."""
        name = f"feedback_{chunk:04d}"
        self.record_groups(name, groups)
        self.record_verdicts(name, groups, verdicts)
        self.record_rankings(name, rankings)
        scores = [
            pointwise_scores(len(ranking.ranks), given) for ranking, given in zip(rankings, verdicts, strict=True)
        ]
        trained = groups_from_feedback(self._groups(groups), rankings, scores)
        write_groups(self._run / "groups" / f"{name}.parquet", trained)

    def import_people_feedback(self, config: PreferenceDataConfig, model: Path, max_tokens: int) -> int:
        """Turns a file of people's pairs, ranked lists or ratings into what the feedback stage leaves.

        Args:
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
        name = "feedback_0000"
        rows = []
        for item, group in zip(feedback, groups, strict=True):
            rows += tables.rollout_rows(people_group(item.prompt, item.completions, group), (), None)
        tables.write_table(self._path("rollouts", name), rows, tables.ROLLOUTS)
        self.record_rankings(name, [item.ranking for item in feedback])
        write_groups(self._run / "groups" / f"{name}.parquet", groups)
        return len(feedback)

    def has_chunk(self, chunk: int) -> bool:
        """Whether ``record_chunk`` came to its end for this chunk."""
        return (self._run / "groups" / f"feedback_{chunk:04d}.parquet").is_file()

    def feedback_counts(self) -> dict[str, float]:
        """Verdicts asked for, the fraction that is missing, and prompts with a ranking, over all chunks."""
        names = [name for name in self.names("verdicts") if name.startswith("feedback_")]
        verdicts = [verdict for name in names for verdict in self.read_verdicts(name)]
        missing = sum(verdict.value is None for verdict in verdicts)
        return {
            "num_verdicts": len(verdicts),
            "missing_fraction": missing / max(len(verdicts), 1),
            "num_rankings": sum(
                any(rank is not None for rank in ranking.ranks) for ranking in self.feedback_rankings()
            ),
        }

    def feedback_rankings(self) -> list[Ranking]:
        """All rankings of the feedback stage, in the order in which its prompts were labelled."""
        names = [name for name in self.names("rankings") if name.startswith("feedback_")]
        return [ranking for name in names for ranking in self.read_rankings(name)]

    def feedback_groups(self) -> list[GroupHandle]:
        """All groups of the feedback stage, back in the store."""
        names = [name for name in self.names("rollouts") if name.startswith("feedback_")]
        return [handle for name in names for handle in self.read_groups(name)]

    def record_eval(self, rows: Sequence[EvalCompletion], name: str = "completions") -> int:
        """Writes the completions of an evaluation, one row per prompt and sample; returns the number of rows."""
        wide = to_wide(rows)
        tables.write_table(self._path("eval", name), wide, tables.EVAL)
        return len(wide)

    def read_groups(self, name: str) -> list[GroupHandle]:
        """Puts recorded groups back into the store, scores included, and returns their handles in the file's order."""
        rows = tables.read_table(self._path("rollouts", name))
        return [self._handle(group) for group in tables.groups_from_rows(rows)]

    def read_verdicts(self, name: str) -> list[Verdict]:
        """Returns recorded verdicts in the file's order."""
        return tables.verdicts_from_rows(tables.read_table(self._path("verdicts", name)))

    def read_rankings(self, name: str) -> list[Ranking]:
        """Returns recorded rankings in the file's order."""
        return tables.rankings_from_rows(tables.read_table(self._path("rankings", name)))

    def names(self, kind: str) -> list[str]:
        """Names of the files of a kind (``"rollouts"``, ``"verdicts"``, ``"rankings"``, ``"eval"``), sorted."""
        folder = self._path(kind, "x").parent
        return sorted(p.stem for p in folder.glob("*.parquet") if _NAME.match(p.stem)) if folder.is_dir() else []

    def _write_groups(self, name: str, groups: Sequence[GroupHandle], step: int | None) -> int:
        rows = []
        for handle, group in zip(groups, self._groups(groups), strict=True):
            rows += tables.rollout_rows(group, handle.scores, step)
        tables.write_table(self._path("rollouts", name), rows, tables.ROLLOUTS)
        return len(rows)

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

    def _path(self, kind: str, name: str) -> Path:
        if kind not in ("rollouts", "verdicts", "rankings", "eval") or not _NAME.match(name):
            found, needed = repr(f"{kind}/{name}"), "a known kind and a plain word"
            raise RecordError("recorder", found=found, needed=needed, action="Use letters, digits, '-' and '_'.")
        return self._run / kind / f"{name}.parquet"
