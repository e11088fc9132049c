"""The evaluation's summary from plain rows, and the bars it has to meet."""

from __future__ import annotations

import dataclasses
import random

import pytest

from rlhf.errors import DataError
from rlhf.evaluation.bootstrap import BootstrapConfig
from rlhf.evaluation.completions import from_wide, to_wide
from rlhf.evaluation.criteria import CriteriaConfig, check_criteria
from rlhf.evaluation.report_card import ReportCardConfig, grade
from tests.rlhf.evaluation.rows import eval_rows

CONFIG = ReportCardConfig(bootstrap=BootstrapConfig(num_resamples=200))


def test_every_metric_before_after_and_best_of_n() -> None:
    rows = eval_rows()
    summary = grade(rows, CONFIG)
    assert summary.num_prompts == 40
    assert summary.num_completions == {"before": 80, "after": 80, "best_of_n": 40}
    expected = {"follows_request", "judge_margin", "reward_model", "kl_per_token", "nll_start", "length", "words"}
    expected |= {"finished", "repetition", "on_topic", "distinct_2"}
    assert set(summary.before) == set(summary.after) == set(summary.best_of_n) == expected
    for metrics in (summary.before, summary.after, summary.best_of_n, summary.delta):
        assert all(interval.low <= interval.mean <= interval.high for interval in metrics.values())
    after = [row for row in rows if row.arm == "after"]
    followed = [(row.vader > 0) == (row.request == "enthusiastic") for row in after]  # type: ignore[operator]
    assert summary.after["follows_request"].mean == pytest.approx(sum(followed) / 80)
    tokens = sum(row.num_tokens for row in after)
    kl = sum(row.kl_per_token * row.num_tokens for row in after) / tokens  # type: ignore[operator]
    assert summary.after["kl_per_token"].mean == pytest.approx(kl)
    assert summary.delta["follows_request"].mean == pytest.approx(
        summary.after["follows_request"].mean - summary.before["follows_request"].mean
    )
    assert summary.win_rate is not None and summary.win_rate.mean > 0.6
    assert summary.missing == {}


def test_order_of_rows_does_not_matter() -> None:
    rows = eval_rows()
    shuffled = rows.copy()
    random.Random(0).shuffle(shuffled)
    first, second = grade(rows, CONFIG), grade(shuffled, CONFIG)
    assert first.after["distinct_2"] == second.after["distinct_2"]
    for name, interval in first.after.items():
        assert second.after[name].mean == pytest.approx(interval.mean)


def test_slices_and_the_worst_one() -> None:
    rows = [
        dataclasses.replace(row, vader=0.5) if row.arm == "after" else row for row in eval_rows()
    ]  # constant praise: one slice always, the other never
    summary = grade(rows, CONFIG)
    assert summary.after["follows_request"].mean == 0.5
    assert summary.slices["enthusiastic"].after["follows_request"].mean == 1.0
    assert summary.slices["scathing"].after["follows_request"].mean == 0.0
    assert summary.worst_slice == "scathing"
    assert summary.slices["scathing"].num_prompts == 20


def test_missing_measures_are_left_out_and_counted() -> None:
    rows = [
        dataclasses.replace(row, judge_margin=None) if row.arm == "after" and row.sample == 0 else row
        for row in eval_rows()
    ]
    summary = grade(rows, CONFIG)
    assert summary.missing == {"after.judge_margin": 40}
    assert summary.win_rate is not None
    kept = [row.judge_margin for row in rows if row.arm == "after" and row.judge_margin is not None]
    assert summary.after["judge_margin"].mean == pytest.approx(sum(kept) / 40)
    none = [dataclasses.replace(row, judge_margin=None) for row in rows]
    assert grade(none, CONFIG).win_rate is None
    assert "judge_margin" not in grade(none, CONFIG).after


def test_repeating_one_text_shows_in_distinct_2() -> None:
    rows = [dataclasses.replace(r, text="I loved this film") if r.arm == "after" else r for r in eval_rows()]
    summary = grade(rows, CONFIG)
    assert summary.after["distinct_2"].mean == pytest.approx(3 / 120)
    assert summary.delta["distinct_2"].high < 0


def test_arms_must_have_the_same_prompts() -> None:
    rows = eval_rows()
    with pytest.raises(DataError, match="0 prompts in after"):
        grade([row for row in rows if row.arm != "after"], CONFIG)
    with pytest.raises(DataError):
        grade([row for row in rows if row.arm != "after" or row.uid != "test/00000"], CONFIG)


def test_wide_rows_come_back() -> None:
    rows = eval_rows(6)
    wide = to_wide(rows)
    assert len(wide) == 12
    assert {"prompt", "request", "before", "after", "before_num_tokens", "after_num_tokens"} <= set(wide[0])
    assert wide[1]["best_of_n"] is None and wide[0]["best_of_n"] is not None
    assert sorted(from_wide(wide), key=lambda r: (r.uid, r.arm, r.sample)) == sorted(
        rows, key=lambda r: (r.uid, r.arm, r.sample)
    )
    with pytest.raises(DataError, match="two rows of before"):
        to_wide([rows[0], rows[0]])
    with pytest.raises(DataError, match="arm 'middle'"):
        to_wide([dataclasses.replace(rows[0], arm="middle")])


def passed(rows, **bars) -> dict[str, bool]:
    return check_criteria(grade(rows, CONFIG), 5.0, CriteriaConfig(min_prompts=40, **bars))


def test_a_good_run_passes_every_bar() -> None:
    assert all(passed(eval_rows()).values())


def test_each_bar_falls_on_its_own_fault() -> None:
    rows = eval_rows()
    follows = passed(eval_rows(before=0.9, after=0.5))
    assert not follows["follows_request_rises"] and not follows["no_slice_falls"] and not follows["win_rate"]
    praise = [dataclasses.replace(r, vader=0.5) if r.arm == "after" else r for r in rows]
    assert not passed(praise)["no_slice_falls"]
    short = [dataclasses.replace(r, num_tokens=10) if r.arm == "after" else r for r in rows]
    assert not passed(short)["length"]
    off_topic = [dataclasses.replace(r, subject="a zebra") if r.arm == "after" else r for r in rows]
    assert not passed(off_topic)["on_topic"]
    same = [dataclasses.replace(r, text="loved this film") if r.arm == "after" else r for r in rows]
    assert not passed(same)["distinct_2"]
    unjudged = [dataclasses.replace(r, judge_margin=None) for r in rows]
    assert not passed(unjudged)["win_rate"]
    assert not check_criteria(grade(rows, CONFIG), 5.0, CriteriaConfig())["num_prompts"]
    assert not check_criteria(grade(rows, CONFIG), 17.0, CriteriaConfig())["peak_memory"]


def test_a_rise_without_certainty_is_not_enough() -> None:
    rows = eval_rows(6, before=0.4, after=0.6, seed=3)
    summary = grade(rows, CONFIG)
    verdict = check_criteria(summary, 5.0, CriteriaConfig(min_delta_follows_request=0.0))
    assert verdict["follows_request_interval_above_zero"] == (summary.delta["follows_request"].low > 0)


def test_intervals_resample_subjects_and_prompts_where_there_is_one_subject() -> None:
    def width(interval) -> float:
        return interval.high - interval.low

    alike = []  # both prompts on a subject go alike, so there are half as many independent cases
    for row in eval_rows():
        subject = int(row.uid.removeprefix("test/")) // 2
        vader = 0.5 if subject % 2 else -0.5
        alike.append(dataclasses.replace(row, subject=f"film {subject}", vader=vader, request="enthusiastic"))
    by_subject = grade(alike, CONFIG)
    by_prompt = grade([dataclasses.replace(row, subject="") for row in alike], CONFIG)
    assert by_subject.after["follows_request"].mean == by_prompt.after["follows_request"].mean == 0.5
    ratio = width(by_subject.after["follows_request"]) / width(by_prompt.after["follows_request"])
    assert ratio == pytest.approx(2**0.5, rel=0.2)
    one = grade([dataclasses.replace(row, subject="film") for row in alike], CONFIG)
    for metric in ("follows_request", "length", "distinct_2"):
        assert one.after[metric] == by_prompt.after[metric], "a single subject cannot be resampled"
