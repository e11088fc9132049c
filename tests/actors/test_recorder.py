"""Every sample, score, verdict and ranking comes back from disk as it was."""

from __future__ import annotations

import dataclasses
import json
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.recorder import RecorderWorker
from actors.store import LocalStore
from rlhf.data.groups import read_groups
from rlhf.data.preferences import PreferenceDataConfig
from rlhf.errors import DataError, RecordError, RolloutsLostError, ValueLostError
from rlhf.feedback.rankings import RankingConfig
from rlhf.runs import tables
from rlhf.types import (
    Completion,
    GroupHandle,
    Judgement,
    Message,
    Prompt,
    Ranking,
    Rollout,
    RolloutGroup,
    Score,
    Verdict,
    VersionSpan,
)


def make_group(index: int, num_samples: int = 4, length: int = 5) -> RolloutGroup:
    rng = np.random.default_rng(index)
    prompt = Prompt(
        uid=f"train/{index:05}",
        messages=(Message("system", "Be brief."), Message("user", f"Film {index}?")),
        token_ids=tuple(range(10 + index)),
        fields={"request": "scathing", "subject": "a heist"},
    )
    rollouts = []
    for sample in range(num_samples):
        size = length + sample
        completion = Completion(
            token_ids=rng.integers(0, 1000, size).astype(np.int32),
            log_probs=rng.normal(size=size).astype(np.float32),
            text=f"text {index}/{sample} – naïve ★",
            finish_reason="stop" if sample % 2 else "length",
            version_spans=(VersionSpan(3, 0, 2), VersionSpan(4, 2, size)),
        )
        rollouts.append(Rollout(completion))
    return RolloutGroup(prompt, tuple(rollouts))


def make_handle(group: RolloutGroup, scores: tuple[Score, ...] = ()) -> GroupHandle:
    lengths = tuple(len(r.completion.token_ids) for r in group.rollouts)
    return GroupHandle(group.prompt.uid, group, len(group.prompt.token_ids), lengths, (3, 4), scores)


SCORES = (
    Score(1.25, {"reward_model": 1.5, "length": -0.25}),
    Score(None, {}, "timed out"),
    Score(0.0, {"reward_model": 0.0}),
    Score(-1e-9),
)


@pytest.fixture
def recorder(tmp_path: Path) -> RecorderWorker:
    return RecorderWorker(tmp_path, LocalStore())


def assert_same_group(left: RolloutGroup, right: RolloutGroup) -> None:
    assert left.prompt == right.prompt
    for a, b in zip(left.rollouts, right.rollouts, strict=True):
        assert a.completion.token_ids.dtype == b.completion.token_ids.dtype == np.int32
        assert a.completion.log_probs.tobytes() == b.completion.log_probs.tobytes()
        assert a.completion.token_ids.tobytes() == b.completion.token_ids.tobytes()
        fields = ("text", "finish_reason", "version_spans")
        assert all(getattr(a.completion, f) == getattr(b.completion, f) for f in fields)


def test_groups_come_back_bit_for_bit(recorder: RecorderWorker, tmp_path: Path) -> None:
    groups = [make_group(0), make_group(1, num_samples=2)]
    assert recorder.record_groups("feedback-0", "a", [make_handle(g) for g in groups]) == 6
    handles = recorder.read_groups("feedback-0", "a")
    for handle, group in zip(handles, groups, strict=True):
        assert_same_group(handle.payload, group)
        assert handle == dataclasses.replace(make_handle(group), payload=handle.payload)
    assert recorder.parts("rollouts", "feedback-0") == ["a"]
    assert recorder.parts("rollouts", "feedback") == recorder.parts("verdicts", "feedback-0") == []


def test_scores_with_a_missing_one_come_back(recorder: RecorderWorker, tmp_path: Path) -> None:
    recorder.record("rl", 7, [make_handle(make_group(0), SCORES)])
    rows = tables.read_table(tmp_path / "rollouts" / "rl.step_000007.parquet")
    assert [row["score"] for row in rows] == [1.25, None, 0.0, -1e-9]
    assert [row["status"] for row in rows] == ["scored", "missing", "scored", "scored"]
    assert rows[1]["error"] == "timed out"
    assert rows[0]["components"] == {"reward_model": 1.5, "length": -0.25}
    assert (rows[0]["stage"], rows[0]["step"]) == ("rl", 7) and rows[0]["prompt"] == "Film 0?"
    assert rows[0]["fields"] == {"request": "scathing", "subject": "a heist"}
    assert rows[0]["version_spans"] == [{"version": 3, "start": 0, "end": 2}, {"version": 4, "start": 2, "end": 5}]
    (handle,) = recorder.read_groups("rl", "step_000007")
    assert handle.scores == SCORES


def test_a_validation_is_kept_and_measured(recorder: RecorderWorker, tmp_path: Path) -> None:
    groups = [make_group(0), make_group(1)]
    measures = recorder.record_validation("rl", 20, [make_handle(g, SCORES) for g in groups], "subject", "keywords")
    rows = tables.read_table(tmp_path / "rollouts" / "rl.validation_000020.parquet")
    assert len(rows) == 8 and rows[0]["score"] == 1.25 and rows[0]["step"] == 20
    # "text 0/1 – naïve ★" has four words; two of its three pairs of words are in the three other siblings too.
    assert measures["words"] == 4.0
    assert measures["on_topic"] == 0.0
    assert 0.0 < measures["distinct_2"] < 1.0
    assert "on_topic" not in recorder.record_validation("rl", 21, [make_handle(groups[0], SCORES)], "none", "none")


def test_a_step_done_again_replaces_its_file(recorder: RecorderWorker, tmp_path: Path) -> None:
    recorder.record("rl", 1, [make_handle(make_group(0))])
    recorder.record("rl", 1, [make_handle(make_group(5, num_samples=2))])
    rows = tables.read_table(tmp_path / "rollouts" / "rl.step_000001.parquet")
    assert [row["uid"] for row in rows] == ["train/00005"] * 2
    assert len(list((tmp_path / "rollouts").iterdir())) == 1


def test_verdicts_carry_the_texts_that_were_judged(recorder: RecorderWorker, tmp_path: Path) -> None:
    group = make_group(0)
    verdicts = (
        Verdict(group.prompt.uid, (0,), 0.7, "positive -0.3, negative -1.0", "tiny/film"),
        Verdict(group.prompt.uid, (3, 1), None, judge="tiny/film", error="refused"),
    )
    assert recorder.record_verdicts("rl", "batch-0", [make_handle(group)], [verdicts]) == 2
    assert recorder.read_verdicts("rl", "batch-0") == list(verdicts)
    rows = tables.read_table(tmp_path / "verdicts" / "rl.batch-0.parquet")
    assert rows[1]["texts"] == [group.rollouts[3].completion.text, group.rollouts[1].completion.text]
    assert rows[1]["value"] is None


def test_rankings_with_ties_and_gaps_come_back(recorder: RecorderWorker) -> None:
    rankings = [Ranking("a", (2, 1, 2, None), "judge"), Ranking("b", (1, 2), "people")]
    assert recorder.record_rankings("ask", "all", rankings) == 2
    assert recorder.read_rankings("ask", "all") == rankings


def judged(uid: str, verdicts: Sequence[Verdict]) -> Judgement:
    """What a judge leaves of pointwise verdicts."""
    scores = tuple(Score(verdict.value, error=verdict.error, evidence=(tuple(verdicts),)) for verdict in verdicts)
    return Judgement(uid, tuple(verdicts), scores, len(verdicts))


def test_the_verdicts_behind_scores_are_written_with_them(recorder: RecorderWorker, tmp_path: Path) -> None:
    groups = [make_group(0), make_group(1)]
    said = [
        tuple(
            Verdict(g.prompt.uid, (k,), None if k == 2 else 0.5 * k, f"said {k}", "j", "x" * (k == 2)) for k in range(4)
        )
        for g in groups
    ]
    handles = [
        make_handle(group, judged(group.prompt.uid, some).scores) for group, some in zip(groups, said, strict=True)
    ]
    recorder.record("rl", 3, handles)
    assert recorder.read_verdicts("rl", "step_000003") == [*said[0], *said[1]], (
        "once each, though all siblings name them"
    )
    recorder.record_validation("rl", 4, handles[:1], "subject", "keywords")
    assert recorder.read_verdicts("rl", "validation_000004") == list(said[0])
    rows = tables.read_table(tmp_path / "verdicts" / "rl.step_000003.parquet")
    assert {(row["stage"], row["part"]) for row in rows} == {("rl", "step_000003")}
    assert rows[5]["reason"] == "said 1" and rows[5]["texts"] == [groups[1].rollouts[1].completion.text]
    recorder.record("rl", 5, [make_handle(groups[0], SCORES)])
    assert recorder.parts("verdicts", "rl") == ["step_000003", "validation_000004"], "no judge, no verdicts"


def test_verdicts_that_are_lost_make_their_group_a_lost_one(tmp_path: Path) -> None:
    class Store(LocalStore):
        def get(self, handle: Any) -> Any:
            if handle == "gone":
                raise ValueLostError("object store", found="no node", needed="the value", action="Look.")
            return handle

    scores = tuple(dataclasses.replace(score, evidence=("gone",)) for score in SCORES)
    handles = [make_handle(make_group(0), SCORES), make_handle(make_group(1), scores)]
    with pytest.raises(RolloutsLostError) as caught:
        RecorderWorker(tmp_path, Store()).record("rl", 0, handles)
    assert caught.value.uids == ("train/00001",)
    assert not list(tmp_path.rglob("*.parquet")), "half a step is not written"


def test_stages_of_one_kind_keep_what_each_wrote(recorder: RecorderWorker, tmp_path: Path) -> None:
    for stage in ("rl", "rl-2"):
        recorder.record(stage, 0, [make_handle(make_group(len(stage)))])
    assert [handle.uid for stage in ("rl", "rl-2") for handle in recorder.read_groups(stage, "step_000000")] == [
        "train/00002",
        "train/00004",
    ]
    assert pq.read_table(tmp_path / "rollouts").column("stage").to_pylist() == ["rl-2"] * 4 + ["rl"] * 4


def test_nothing_to_write_is_an_empty_table(recorder: RecorderWorker) -> None:
    recorder.record_groups("ask", "none", [])
    assert recorder.read_groups("ask", "none") == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a.b"])
def test_names_stay_inside_the_run(recorder: RecorderWorker, name: str) -> None:
    for stage, part in ((name, "a"), ("a", name)):
        with pytest.raises(RecordError, match="plain word"):
            recorder.record_rankings(stage, part, [])


def test_a_score_too_few_is_refused_and_leaves_no_file(recorder: RecorderWorker, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 scores for 4 siblings"):
        recorder.record("rl", 0, [make_handle(make_group(0), SCORES[:3])])
    assert recorder.parts("rollouts", "rl") == []


def test_full_disk_is_a_typed_error_and_the_old_file_stays(recorder: RecorderWorker, tmp_path: Path) -> None:
    recorder.record("rl", 1, [make_handle(make_group(0))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(RecordError, match="Free space"):
            recorder.record("rl", 1, [make_handle(make_group(i, length=5000)) for i in range(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (handle,) = recorder.read_groups("rl", "step_000001")
    assert_same_group(handle.payload, make_group(0))
    assert len(list((tmp_path / "rollouts").iterdir())) == 1


def test_a_broken_or_absent_file_is_a_typed_error(recorder: RecorderWorker, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="absent.parquet"):
        recorder.read_groups("rl", "absent")
    recorder.record_rankings("ask", "cut", [Ranking("a", (1, 2))])
    path = tmp_path / "rankings" / "ask.cut.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match="cut.parquet"):
        recorder.read_rankings("ask", "cut")


def test_a_row_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="unknown column 'rank'"):
        tables.write_table(tmp_path / "a.parquet", [{"uid": "a", "rank": 1}], tables.RANKINGS)
    with pytest.raises(RecordError):
        tables.write_table(tmp_path / "a.parquet", [{"uid": 3}], tables.RANKINGS)


def test_any_parquet_reader_can_open_the_files(recorder: RecorderWorker, tmp_path: Path) -> None:
    recorder.record("rl", 2, [make_handle(make_group(0), SCORES)])
    table = pq.read_table(tmp_path / "rollouts")
    assert table.schema.names == tables.ROLLOUTS.names and table.num_rows == 4


def test_a_feedback_chunk_is_complete_when_its_training_groups_are_there(
    recorder: RecorderWorker, tmp_path: Path
) -> None:
    groups = [make_group(0), make_group(1)]
    handles = [make_handle(group) for group in groups]
    verdicts = [
        tuple(Verdict(g.prompt.uid, (k,), None if k == 2 else float(k), error="" if k != 2 else "x") for k in range(4))
        for g in groups
    ]
    rankings = [Ranking(group.prompt.uid, (3, 2, None, 1), "judge") for group in groups]  # of 0, 1, none and 3
    assert not recorder.has_chunk("ask", 0)
    judgements = [judged(g.prompt.uid, given) for g, given in zip(groups, verdicts, strict=True)]
    recorder.record_chunk("ask", 0, handles, judgements, RankingConfig())
    assert recorder.has_chunk("ask", 0) and not recorder.has_chunk("ask", 1) and not recorder.has_chunk("other", 0)
    assert recorder.feedback_counts("ask") == {"num_verdicts": 8, "missing_fraction": 0.25, "num_rankings": 2}
    assert [handle.uid for handle in recorder.feedback_groups("ask")] == [group.prompt.uid for group in groups]
    assert recorder.feedback_rankings("ask") == rankings
    assert recorder.put_rankings("ask") == [rankings]
    assert recorder.put_rankings("ask", [groups[1].prompt.uid]) == [rankings[1:]]
    (first, _) = read_groups([tmp_path / "groups" / "ask.chunk_0000.parquet"])
    np.testing.assert_array_equal(first.ranks, [3.0, 2.0, np.nan, 1.0])
    np.testing.assert_array_equal(first.completion_ids[3], groups[0].rollouts[3].completion.token_ids)


def test_people_replace_the_judge(recorder: RecorderWorker, tmp_path: Path, tiny_model_dir: Path) -> None:
    lines = [
        {"prompt": "A film about a heist?", "chosen": "I loved it.", "rejected": "I hated it."},
        {"prompt": "A film about the sea?", "completions": ["best", "good", "bad"]},
    ]
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorder.import_people_feedback("ask", PreferenceDataConfig(path=str(path)), tiny_model_dir, 256) == 2
    rankings = recorder.read_rankings("ask", "chunk_0000")
    assert [ranking.ranks for ranking in rankings] == [(1, 2), (1, 2, 3)]
    assert {ranking.source for ranking in rankings} == {"people"}
    groups = read_groups([tmp_path / "groups" / "ask.chunk_0000.parquet"])
    assert [group.ranks for group in groups] == [(1.0, 2.0), (1.0, 2.0, 3.0)]
    texts = [r.completion.text for handle in recorder.read_groups("ask", "chunk_0000") for r in handle.payload.rollouts]
    assert texts == ["I loved it.", "I hated it.", "best", "good", "bad"]
    assert recorder.parts("verdicts", "ask") == [], "people give rankings, no verdicts"


def test_a_fault_in_peoples_file_names_its_line(recorder: RecorderWorker, tmp_path: Path, tiny_model_dir: Path) -> None:
    path = tmp_path / "people.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"\n')
    with pytest.raises(DataError, match="people.jsonl:2"):
        recorder.import_people_feedback("ask", PreferenceDataConfig(path=str(path)), tiny_model_dir, 256)
    assert recorder.parts("rankings", "ask") == []


def test_a_write_that_a_lost_driver_had_asked_for_comes_before_the_next_ones(
    recorder: RecorderWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(*_: Any) -> None:
        begun.set()
        assert may_end.wait(30)
        order.append("written")

    def abandon() -> None:
        recorder.abandon()
        order.append("abandoned")

    monkeypatch.setattr(tables, "write_part", slow)
    writing = threading.Thread(target=recorder.record, args=("rl", 1, [make_handle(make_group(0))]))
    writing.start()
    assert begun.wait(30)
    waiting = threading.Thread(target=abandon)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    may_end.set()
    for thread in (writing, waiting):
        thread.join(30)
    assert order == ["written", "abandoned"]
    recorder.abandon()  # with nothing under way it returns at once
