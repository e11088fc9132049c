"""The evaluator's view of prompts: a request that it cannot place is named, with its prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.evaluator import EvaluatorWorker
from actors.store import LocalStore
from rlhf.errors import ConfigError, DataError, RlhfError
from rlhf.evaluation.report_card import ReportCardConfig
from rlhf.types import Completion, GroupHandle, Prompt, Ranking, Rollout, RolloutGroup, VersionSpan


def group(uid: str, fields: dict[str, str]) -> GroupHandle:
    texts = ["a wonderful, great film", "a terrible, awful film"]
    ids, log_probs = np.array([5], np.int32), np.zeros(1, np.float32)
    rollouts = tuple(Rollout(Completion(ids, log_probs, text, "stop", (VersionSpan(0, 0, 1),))) for text in texts)
    return GroupHandle(uid, RolloutGroup(Prompt(uid, (), (1,), fields), rollouts), 1, (1, 1), (0, 0))


def test_agreement_goes_by_what_was_asked(tmp_path: Path) -> None:
    worker = EvaluatorWorker(tmp_path, LocalStore(), ReportCardConfig())
    groups = [group("praise", {"request": "enthusiastic"}), group("scorn", {"request": "scathing"})]
    rankings = [Ranking("praise", (1, 2)), Ranking("scorn", (2, 1))]
    assert worker.judge_agreement(groups, rankings)["mean"] == 1.0
    assert worker.judge_agreement(groups, [Ranking("praise", (2, 1))])["mean"] == 0.0


@pytest.mark.parametrize(
    ("fields", "kind", "found"),
    [({}, DataError, "prompt p0.*no field 'request'"), ({"request": "polite"}, ConfigError, "request 'polite'")],
)
def test_a_request_that_nobody_knows_is_named(
    tmp_path: Path, fields: dict[str, str], kind: type[RlhfError], found: str
) -> None:
    worker = EvaluatorWorker(tmp_path, LocalStore(), ReportCardConfig())
    with pytest.raises(kind, match=found):
        worker.judge_agreement([group("p0", fields)], [Ranking("p0", (1, 2))])
