"""The evaluator and the rules' worker on groups that lie in the process itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import actors.evaluator
from actors.evaluator import EvaluatorWorker
from actors.rules import RulesWorker
from actors.store import LocalStore
from rlhf.errors import ConfigError, DataError, RolloutsLostError
from rlhf.evaluation.bootstrap import BootstrapConfig
from rlhf.evaluation.completions import from_wide
from rlhf.evaluation.instruments import RESULTS, Instruments
from rlhf.evaluation.report_card import ReportCardConfig, grade
from rlhf.rewards.rules import NonEmptyRule, RepetitionRule
from rlhf.runs.tables import read_table
from rlhf.types import (
    Completion,
    GroupHandle,
    Message,
    Prompt,
    Ranking,
    Rollout,
    RolloutGroup,
    Score,
    Verdict,
    VersionSpan,
)
from tests.actors.test_store import LossyStore

CARD = ReportCardConfig(bootstrap=BootstrapConfig(num_resamples=100))
ALL = Instruments({})
NONE = Instruments(dict.fromkeys(RESULTS, "not here"))
PRAISE, SCORN = "I loved this wonderful film.", "An awful, boring disaster."


def group(
    uid: str, texts: Sequence[str], fields: dict[str, str], scores: Sequence[dict[str, float]] = ()
) -> GroupHandle:
    """Two tokens per completion; log-probs -1 and -2, under the start -2 and -4."""
    prompt = Prompt(uid, (Message("user", "Write a review."),), (5, 6, 7), fields)
    own, start = np.array([-1.0, -2.0], np.float32), np.array([-2.0, -4.0], np.float32)
    ids = np.array([9, 10], np.int32)
    rollouts = tuple(Rollout(Completion(ids, own, text, "stop", (VersionSpan(0, 0, 2),))) for text in texts)
    handle = GroupHandle(uid, RolloutGroup(prompt, rollouts), 3, (2,) * len(texts), (0, 0))
    return dataclasses.replace(
        handle,
        annotations={"reference_log_probs": tuple(start for _ in texts)},
        scores=tuple(Score(None, parts, "measures") for parts in scores or [{}] * len(texts)),
    )


def test_completions_are_measured_written_and_graded(tmp_path: Path) -> None:
    fields = {"request": "scathing", "subject": "a film"}
    margins = [{"judge_margin": 1.0, "reward_model": value} for value in (0.1, 0.2, 0.9)]
    arms = {
        "before": [group("p/0", [PRAISE, PRAISE, SCORN], fields, margins)],
        "after": [group("p/0", [SCORN, SCORN], fields, [{"judge_margin": 2.0, "reward_model": 0.5}] * 2)],
    }
    report = EvaluatorWorker(tmp_path, LocalStore(), CARD).evaluate("final", arms, 2, 3, ALL)
    rows = from_wide(read_table(tmp_path / "eval" / "final" / "completions.parquet"))
    assert grade(rows, CARD).model_dump(mode="json") == report, "the table holds all that the summary is made of"
    assert report["num_completions"] == {"before": 2, "after": 2, "best_of_n": 1}
    assert report["before"]["follows_request"]["mean"] == 0.0
    assert report["after"]["follows_request"]["mean"] == report["best_of_n"]["follows_request"]["mean"] == 1.0
    assert report["best_of_n"]["reward_model"]["mean"] == 0.9, "the best sibling, though it is not of the arm itself"
    assert report["after"]["kl_per_token"]["mean"] == pytest.approx(1.5)
    assert report["after"]["nll_start"]["mean"] == pytest.approx(3.0)
    assert report["win_rate"]["mean"] == 1.0 and report["worst_slice"] == "scathing"
    assert report["missing"] == {}


def test_every_sample_drawn_and_every_verdict_on_it_is_kept(tmp_path: Path) -> None:
    margins = [{"judge_margin": float(k), "reward_model": value} for k, value in enumerate((0.1, 0.9, 0.2, 0.9))]
    before = group("p/0", [PRAISE, SCORN, "dull", "so so"], {}, margins)
    said = tuple(Verdict("p/0", (k,), float(k), f"said {k}", "judge") for k in range(4))
    before = dataclasses.replace(before, scores=tuple(dataclasses.replace(s, evidence=(said,)) for s in before.scores))
    after = dataclasses.replace(group("p/0", [SCORN], {}, [{"reward_model": 0.5}]), weight_versions=(7, 7))
    EvaluatorWorker(tmp_path, LocalStore(), CARD).evaluate("final", {"before": [before], "after": [after]}, 1, 4, NONE)
    rows = read_table(tmp_path / "eval" / "final" / "samples.parquet")
    assert [(row["arm"], row["sample"], row["text"]) for row in rows] == [
        ("before", 0, PRAISE),
        ("before", 1, SCORN),
        ("before", 2, "dull"),
        ("before", 3, "so so"),
        ("after", 0, SCORN),
    ]
    assert [row["reward_model"] for row in rows] == [0.1, 0.9, 0.2, 0.9, 0.5]
    assert [row["best_of_n"] for row in rows] == [False, True, False, False, False], "the first of equals"
    assert [row["weight_version"] for row in rows] == [0, 0, 0, 0, 7]
    (wide,) = read_table(tmp_path / "eval" / "final" / "completions.parquet")
    assert (wide["before"], wide["after"], wide["best_of_n"]) == (PRAISE, SCORN, SCORN)
    verdicts = read_table(tmp_path / "verdicts" / "final.before.parquet")
    assert [(row["reason"], row["texts"]) for row in verdicts[:2]] == [("said 0", [PRAISE]), ("said 1", [SCORN])]
    assert len(verdicts) == 4 and {(row["stage"], row["part"]) for row in verdicts} == {("final", "before")}
    assert not (tmp_path / "verdicts" / "final.after.parquet").exists(), "no judge was asked there"


def test_a_group_is_lost_with_the_log_probs_that_were_put_for_it(tmp_path: Path) -> None:
    kept, gone = group("p/0", [PRAISE], {}), group("p/1", [SCORN], {})
    gone = dataclasses.replace(gone, annotations={"reference_log_probs": None})
    with pytest.raises(RolloutsLostError) as caught:
        EvaluatorWorker(tmp_path, LossyStore(), CARD).evaluate("final", {"after": [kept, gone]}, 1, 0, NONE)
    assert caught.value.uids == ("p/1",)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(("best_of", "best"), [(2, 0.2), (3, 0.9), (0, None)])
def test_the_best_may_be_of_fewer_than_an_arm_has(best_of: int, best: float | None, tmp_path: Path) -> None:
    scores = [{"reward_model": value} for value in (0.1, 0.2, 0.9)]
    arms = {arm: [group("p/0", [PRAISE] * 3, {}, scores)] for arm in ("before", "after")}
    report = EvaluatorWorker(tmp_path, LocalStore(), CARD).evaluate("final", arms, 3, best_of, NONE)
    assert report["num_completions"] == {"before": 3, "after": 3, "best_of_n": 1 if best_of else 0}
    assert report["best_of_n"].get("reward_model", {"mean": None})["mean"] == best


def test_a_measure_that_could_not_be_had_is_missing_and_no_number(tmp_path: Path) -> None:
    fields = {"request": "scathing"}
    arms = {
        "before": [group("p/0", [PRAISE], fields, [{"reward_model": 0.1}])],
        "after": [group("p/0", [SCORN], fields, [{"judge_margin": 2.0, "reward_model": 0.5}])],
    }
    report = EvaluatorWorker(tmp_path, LocalStore(), CARD).evaluate("final", arms, 1, 0, ALL)
    assert report["missing"] == {"before.judge_margin": 1}
    assert "judge_margin" not in report["before"] and report["win_rate"] is None


def test_bare_prompts_are_measured_without_the_independent_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise ConfigError("evaluation", found="no package", needed="vaderSentiment", action="Install it.")

    monkeypatch.setattr(actors.evaluator, "VaderScorer", absent)
    arms = {"before": [group("p/0", [PRAISE], {})], "after": [group("p/0", [SCORN], {})]}
    report = EvaluatorWorker(tmp_path, LocalStore(), CARD).evaluate("final", arms, 1, 0, NONE)
    assert {"kl_per_token", "nll_start", "length", "distinct_2"} <= set(report["after"])
    assert not {"follows_request", "judge_margin", "reward_model", "on_topic"} & set(report["after"])
    assert report["slices"] == {} and report["missing"] == {} and report["best_of_n"] == {}
    with pytest.raises(ConfigError, match="vaderSentiment"):
        EvaluatorWorker(tmp_path, LocalStore(), CARD).evaluate("final", arms, 1, 0, ALL)


def test_agreement_counts_ranked_pairs_in_the_direction_of_the_request(tmp_path: Path) -> None:
    worker = EvaluatorWorker(tmp_path, LocalStore(), CARD)
    groups = [
        group(f"p/{i}", [PRAISE, SCORN], {"request": request})
        for i, request in enumerate(("enthusiastic", "scathing", "scathing", "scathing"))
    ]
    agreeing = [Ranking("p/0", (1, 2), "judge"), Ranking("p/1", (2, 1), "judge")]
    assert worker.judge_agreement(groups, [agreeing])["mean"] == 1.0
    assert worker.judge_agreement(groups, [agreeing, [Ranking("p/2", (1, 2), "judge")]])["mean"] == pytest.approx(2 / 3)
    assert worker.judge_agreement(groups, [agreeing, [Ranking("p/2", (None, 1), "judge")]])["mean"] == 1.0


@pytest.mark.parametrize(("fields", "found"), [({}, "no 'request'"), ({"request": "polite"}, "request = 'polite'")])
def test_agreement_names_the_prompt_whose_request_has_no_sign(
    tmp_path: Path, fields: dict[str, str], found: str
) -> None:
    worker = EvaluatorWorker(tmp_path, LocalStore(), CARD)
    with pytest.raises(DataError, match=f"prompt p/4: found {found}"):
        worker.judge_agreement([group("p/4", [PRAISE, SCORN], fields)], [[Ranking("p/4", (1, 2), "judge")]])


def test_rules_score_every_sibling_of_every_group() -> None:
    worker = RulesWorker([NonEmptyRule(rule="non_empty", weight=2.0), RepetitionRule(rule="repetition")], LocalStore())
    worker.start()
    first, second = worker.score([group("p/0", ["so so so so", ""], {}), group("p/1", [PRAISE], {})])
    assert [score.components["non_empty"] for score in (*first, *second)] == [1.0, 0.0, 1.0]
    assert first[0].value == pytest.approx(2.0 + first[0].components["repetition"])
    assert first[0].components["repetition"] < 0.0
    assert second[0].value == pytest.approx(2.0)
    worker.stop()
