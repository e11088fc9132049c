"""The evaluator: grades held-out completions next to the record, so that no text passes the driver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.health import ProbedThread
from actors.store import Store, evidence_of, fetch_all, fetch_payload
from rlhf.evaluation.bootstrap import resampled_by
from rlhf.evaluation.completions import EvalCompletion, to_wide
from rlhf.evaluation.independent import VaderScorer
from rlhf.evaluation.instruments import Instruments, require_signs
from rlhf.evaluation.report_card import ReportCardConfig, grade
from rlhf.evaluation.reward_model import pair_accuracy
from rlhf.runs import tables
from rlhf.types import GroupHandle, Handle, RolloutGroup

Arms = Mapping[str, Sequence[GroupHandle]]
"""Groups by arm (``before``, ``after``). The scores' components hold ``judge_margin`` with a judge and
``reward_model`` with a reward model; ``annotations`` hold the start model's ``reference_log_probs``."""

Reference = Sequence[NDArray[np.float32]]
"""The start model's log-probs of a group's completions: K arrays [T_k]."""


class EvaluatorWorker(ProbedThread):
    """Measures completions with the independent scorer and summarises them.

    Args:
        run_dir: The run directory; tables are written there.
        store: Where groups live.
        config: Intervals, signs, and which columns name slice and subject.
    """

    def __init__(self, run_dir: Path, store: Store, config: ReportCardConfig) -> None:
        self._run_dir = run_dir
        self._store = store
        self._config = config

    @functools.cached_property
    def _scorer(self) -> VaderScorer:
        """Made when first needed: an evaluation without it does not need the package either."""
        return VaderScorer()

    def start(self) -> None:
        """Answers when the worker is up."""

    def stop(self) -> None:
        """Nothing to give back."""

    def evaluate(
        self, stage: str, arms: Arms, num_samples: int, best_of: int, instruments: Instruments
    ) -> dict[str, Any]:
        """Writes the tables and returns ``EvalSummary`` as plain JSON.

        ``eval/STAGE/completions.parquet`` has the arms, ``eval/STAGE/samples.parquet`` every completion that was drawn,
        and ``verdicts/STAGE.ARM.parquet`` what the judge said of them.

        Args:
            stage: Names the tables.
            arms: ``before`` may have more siblings than ``num_samples``; the first ones are the arm itself.
            num_samples: Completions per prompt in an arm.
            best_of: The best of so many of the start's completions by the reward model are the arm ``best_of_n``; 0
                leaves it out.
            instruments: What is measured.
        """
        rows: list[EvalCompletion] = []
        drawn: list[dict[str, Any]] = []
        for arm, groups in arms.items():
            payloads = fetch_all(groups, self._store, fetch_payload, where="evaluator")
            starts = fetch_all(groups, self._store, _log_probs_of_start, where="evaluator")
            self._write_verdicts(stage, arm, groups, payloads)
            for handle, group, start in zip(groups, payloads, starts, strict=True):
                siblings = self._rows(arm, handle, group, start, instruments)
                best = _best(siblings[:best_of]) if arm == "before" else None
                rows += siblings[:num_samples]
                if best is not None:
                    rows.append(dataclasses.replace(best, arm="best_of_n", sample=0))
                version = max(handle.weight_versions)
                drawn += [
                    dataclasses.asdict(row) | {"weight_version": version, "best_of_n": row is best} for row in siblings
                ]
        folder = self._run_dir / "eval" / stage
        tables.write_table(folder / "samples.parquet", drawn, tables.SAMPLES)
        tables.write_table(folder / "completions.parquet", to_wide(rows), tables.EVAL)
        return grade(rows, self._config, unmeasured=instruments.unmeasured).model_dump(mode="json")

    def _write_verdicts(
        self, stage: str, arm: str, groups: Sequence[GroupHandle], payloads: Sequence[RolloutGroup]
    ) -> None:
        given = fetch_all(groups, self._store, evidence_of, where="evaluator")
        rows = [row for group, some in zip(payloads, given, strict=True) for row in tables.verdict_rows(group, some)]
        if rows:
            tables.write_part(self._run_dir, "verdicts", stage, arm, rows)

    def judge_agreement(self, groups: Sequence[GroupHandle], rankings: Sequence[Handle]) -> dict[str, float]:
        """Share of the ranked pairs that the independent scorer orders alike, as an ``Interval``; its ties count half.

        Args:
            groups: The texts; those without a ranking are left out.
            rankings: Handles of lists of the judge's ``Ranking``, by what was asked for.
        """
        ranks_by_uid = {ranking.uid: ranking.ranks for handle in rankings for ranking in self._store.get(handle)}
        ranked = [handle for handle in groups if handle.uid in ranks_by_uid]
        scores, subjects = [], []
        for group in fetch_all(ranked, self._store, fetch_payload, where="evaluator"):
            require_signs([group.prompt], self._config, "judge's agreement")
            sign = self._config.request_signs[group.prompt.fields[self._config.slice_field]]
            texts = [rollout.completion.text for rollout in group.rollouts]
            scores.append([sign * value for value in self._scorer.score(texts)])
            subjects.append(group.prompt.fields.get(self._config.subject_field, ""))
        ranks = [ranks_by_uid[handle.uid] for handle in ranked]
        clusters = resampled_by(subjects, [handle.uid for handle in ranked])
        return pair_accuracy(scores, ranks, self._config.bootstrap, clusters).model_dump()

    def _rows(
        self, arm: str, handle: GroupHandle, group: RolloutGroup, reference: Reference, instruments: Instruments
    ) -> list[EvalCompletion]:
        fields = group.prompt.fields
        texts = [rollout.completion.text for rollout in group.rollouts]
        compounds = self._scorer.score(texts) if "sentiment" in instruments else [None] * len(texts)
        rows = []
        for sample, rollout in enumerate(group.rollouts):
            completion = rollout.completion
            parts = handle.scores[sample].components
            start = np.asarray(reference[sample], np.float64)
            own = np.asarray(completion.log_probs, np.float64)
            rows.append(
                EvalCompletion(
                    uid=group.prompt.uid,
                    sample=sample,
                    arm=arm,
                    prompt=tables.prompt_text(group.prompt),
                    request=fields.get(self._config.slice_field, ""),
                    subject=fields.get(self._config.subject_field, ""),
                    keywords=fields.get(self._config.keywords_field, ""),
                    text=completion.text,
                    num_tokens=len(completion.token_ids),
                    finish_reason=completion.finish_reason,
                    vader=compounds[sample],
                    judge_margin=parts.get("judge_margin"),
                    reward_model=parts.get("reward_model"),
                    kl_per_token=float((own - start).mean()),
                    nll_start=float(-start.mean()),
                )
            )
        return rows


def _log_probs_of_start(handle: GroupHandle, store: Store) -> Reference:
    found: Reference = store.get(handle.annotations["reference_log_probs"])
    return found


def _best(siblings: Sequence[EvalCompletion]) -> EvalCompletion | None:
    """The one that the reward model likes best, the first of equals; None where it scored none."""
    scored = [row for row in siblings if row.reward_model is not None]
    return max(scored, key=lambda row: (row.reward_model, -row.sample)) if scored else None
