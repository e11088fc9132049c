"""What an evaluation measures follows from the recipe and the prompts; mistakes are told from choices."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rlhf.errors import DataError
from rlhf.evaluation.bootstrap import BootstrapConfig
from rlhf.evaluation.independent import IndependentScorerConfig
from rlhf.evaluation.instruments import RESULTS, Instruments, choose_instruments, require_signs
from rlhf.evaluation.report_card import ReportCardConfig, grade
from rlhf.types import Message, Prompt
from tests.rlhf.evaluation.rows import eval_rows

FILM = {"request": "scathing", "subject": "a heist"}


def prompts(*fields: dict[str, str]) -> list[Prompt]:
    return [Prompt(f"p/{i}", (Message("user", "Write."),), (1,), row) for i, row in enumerate(fields)]


def chosen(given: list[Prompt], *, judged: bool = True, has_reward_model: bool = True, **card: Any) -> Instruments:
    return choose_instruments(
        given, ReportCardConfig(**card), judged=judged, has_reward_model=has_reward_model, where="stage evaluate"
    )


def test_everything_is_measured_where_everything_is_there() -> None:
    found = chosen(prompts(FILM, FILM | {"request": "enthusiastic"}))
    assert all(name in found for name in RESULTS)
    assert found.notes() == [] and found.unmeasured == frozenset()


def test_bare_prompts_without_judge_or_reward_model_leave_the_rest() -> None:
    found = chosen(prompts({}, {}), judged=False, has_reward_model=False)
    assert set(found.left_out) == set(RESULTS)
    assert found.unmeasured == {"vader", "judge_margin", "reward_model"}
    told = "\n".join(found.notes())
    assert all(metric in told for metrics in RESULTS.values() for metric in metrics)
    assert "constitutions.evaluation" in told and "no prompt has a column 'request'" in told


def test_requests_that_are_no_sentiments_are_slices_without_signs() -> None:
    found = chosen(prompts({"request": "short"}, {"request": "long"}))
    assert "slices" in found and "sentiment" not in found
    assert "request_signs" in found.left_out["sentiment"]


def test_the_independent_scorer_can_be_left_out() -> None:
    found = chosen(prompts(FILM, {"request": "neutral"}), independent=None)
    assert "slices" in found and found.left_out["sentiment"] == "report_card.independent is null"


def test_some_prompts_may_lack_a_subject() -> None:
    assert "subject" in chosen(prompts(FILM, {"request": "scathing"}))


@pytest.mark.parametrize(
    ("fields", "card", "said"),
    [
        ([FILM, {"subject": "x"}], {}, "report_card.slice_field, prompt p/1: found no 'request'"),
        ([FILM, FILM | {"request": " "}], {}, "report_card.slice_field, prompt p/1"),
        ([FILM], {"slice_field": "genre"}, "report_card.slice_field, prompt p/0: found no 'genre'"),
        ([FILM], {"subject_field": "topic"}, "report_card.subject_field, prompt p/0: found no 'topic'"),
        ([FILM], {"keywords_field": "stems"}, "report_card.keywords_field, prompt p/0: found no 'stems'"),
        ([FILM, FILM | {"request": "neutral"}], {}, "prompt p/1: found request = 'neutral'"),
        ([FILM], {"independent": IndependentScorerConfig(request_signs={"kind": 1})}, "found request = 'scathing'"),
    ],
)
def test_mistakes_are_refused_with_prompt_and_key(
    fields: list[dict[str, str]], card: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        chosen(prompts(*fields), **card)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_agreement_needs_a_sign_of_every_prompt() -> None:
    require_signs(prompts(FILM), ReportCardConfig(), "stage feedback")
    for fields, found in (({}, "no 'request'"), ({"request": "polite"}, "request = 'polite'")):
        with pytest.raises(DataError, match=f"stage feedback, prompt p/1: found {found}"):
            require_signs(prompts(FILM, fields), ReportCardConfig(), "stage feedback")


def test_a_summary_without_instruments_has_the_rest_and_counts_nothing_as_missing() -> None:
    card = ReportCardConfig(bootstrap=BootstrapConfig(num_resamples=100))
    bare = [
        dataclasses.replace(row, request="", subject="", vader=None, judge_margin=None, reward_model=None)
        for row in eval_rows(8)
        if row.arm != "best_of_n"
    ]
    instruments = chosen(prompts({}), judged=False, has_reward_model=False)
    summary = grade(bare, card, unmeasured=instruments.unmeasured)
    rest = {"kl_per_token", "nll_start", "length", "words", "finished", "repetition", "distinct_2"}
    assert set(summary.before) == set(summary.after) == rest
    assert (summary.win_rate, summary.slices, summary.worst_slice, summary.missing) == (None, {}, "", {})
    assert grade(bare, card).missing["after.judge_margin"] == 16, "asked for and not had is missing"


def test_slices_without_signs_have_all_but_the_request() -> None:
    rows = [dataclasses.replace(row, request=f"kind {row.uid[-1]}") for row in eval_rows(4)]
    summary = grade(rows, ReportCardConfig(independent=None))
    assert sorted(summary.slices) == ["kind 0", "kind 1", "kind 2", "kind 3"]
    assert "follows_request" not in summary.after and summary.worst_slice == ""
