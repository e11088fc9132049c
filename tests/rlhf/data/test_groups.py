"""Training groups: kept on disk, split without tearing subjects apart, and the best completion of each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.groups import best_completions, groups_from_feedback, read_groups, split_held_out, write_groups
from rlhf.data.preferences import PreferenceDataConfig, feedback_groups, load_people_feedback
from rlhf.data.supervised import SupervisedDataConfig, load_supervised
from rlhf.errors import DataError
from rlhf.types import Completion, Prompt, Ranking, Rollout, RolloutGroup, TrainGroup

NAN = math.nan


def group(uid: str, cluster: str = "", ranks: Sequence[float] | None = None, scores=None) -> TrainGroup:
    """Completion k is the single token 10 + k."""
    ids = tuple(np.array([10 + k], np.int32) for k in range(len(ranks or (1, 2))))
    return TrainGroup(uid, np.array([1, 2], np.int32), ids, ranks=ranks, scores=scores, cluster=cluster)


def test_what_feedback_leaves_comes_back(tmp_path: Path) -> None:
    completion = Completion(np.array([5, 6], np.int32), np.zeros(2, np.float32), "", "stop", ())
    prompts = [Prompt("a", (), (1,), {"subject": "the sea"}), Prompt("b", (), (2, 3))]
    rollouts = [RolloutGroup(prompt, (Rollout(completion), Rollout(completion))) for prompt in prompts]
    rankings = [Ranking("a", (2, 1)), Ranking("b", (None, 1))]
    made = groups_from_feedback(rollouts, rankings, [(0.5, None), (None, None)])
    write_groups(tmp_path / "groups.parquet", made)
    first, second = read_groups([tmp_path / "groups.parquet"])
    assert (first.uid, first.ranks, first.cluster) == ("a", (2.0, 1.0), "the sea")
    assert first.scores is not None and first.scores[0] == 0.5 and math.isnan(first.scores[1])
    assert (second.uid, second.prompt_ids.tolist(), second.cluster) == ("b", [2, 3], "")
    assert second.ranks is not None and math.isnan(second.ranks[0])
    assert [ids.tolist() for ids in second.completion_ids] == [[5, 6], [5, 6]]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["", "sea", "heist", "storm", "train"]), min_size=2, max_size=60),
    st.floats(0.01, 0.9),
    st.integers(0, 5),
)
def test_a_split_tears_no_subject_apart_and_loses_nothing(clusters: list[str], fraction: float, seed: int) -> None:
    groups = [group(f"p{i}", cluster) for i, cluster in enumerate(clusters)]
    train, held_out = split_held_out(groups, fraction, seed=seed)
    assert sorted(g.uid for g in train + held_out) == sorted(g.uid for g in groups)
    assert train and held_out
    names = {g.cluster or g.uid for g in groups}
    if len(names) > 1:
        assert not {g.cluster or g.uid for g in train} & {g.cluster or g.uid for g in held_out}
    sizes = [sum((g.cluster or g.uid) == name for g in groups) for name in names]
    largest = max(round(fraction * len(groups)), min(sizes), 1)
    assert len(held_out) <= largest
    again = split_held_out(groups, fraction, seed=seed)
    assert [g.uid for g in again[1]] == [g.uid for g in held_out]


def test_pairs_of_prompts_on_one_subject_fill_the_share() -> None:
    groups = [group(f"p{i}", f"subject {i // 2}") for i in range(160)]
    train, held_out = split_held_out(groups, 0.15, seed=17)
    assert (len(train), len(held_out)) == (136, 24)
    assert split_held_out(groups, 0.0, seed=17) == (groups, [])


def test_prompts_are_split_where_all_are_about_one_subject() -> None:
    train, held_out = split_held_out([group(f"p{i}", "film") for i in range(10)], 0.2, seed=0)
    assert (len(train), len(held_out)) == (8, 2)


def test_the_rankings_of_one_prompt_and_the_turns_of_one_chat_stay_together(tmp_path: Path, tokenizer) -> None:
    people = tmp_path / "people.jsonl"
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "c", "rejected": "d"},  # never compared with the first pair
        {"prompt": "q", "chosen": "x", "rejected": "y", "subject": "the sea"},
    ]
    people.write_text("\n".join(json.dumps(row) for row in rows))
    feedback = load_people_feedback(PreferenceDataConfig(path=str(people)), tokenizer, 200)
    assert [item.prompt.uid for item in feedback] == ["people/00000/0", "people/00000/1", "people/00001"]
    assert [g.cluster for g in feedback_groups(feedback, tokenizer)] == ["people/00000", "people/00000", "the sea"]

    chats = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    records = [{"messages": turns}, {"instruction": "i", "output": "o", "subject": "the sea"}]
    chats.write_text("\n".join(json.dumps(row) for row in records))
    groups = load_supervised(SupervisedDataConfig(path=str(chats), turns="all"), tokenizer, 200)
    assert [g.cluster for g in groups] == ["chats/00000", "chats/00000", "the sea"]


@pytest.mark.parametrize("scores", [None, (NAN, NAN, NAN)])
def test_people_and_pairwise_judges_rank_without_scores(scores) -> None:
    groups = [group("a", "sea", (2.0, 1.0, 3.0), scores), group("b", "", (NAN, 2.0, 1.0), scores)]
    for min_score in (None, 0.5):
        chosen = best_completions(groups, min_score=min_score)
        assert [(g.uid, [ids.tolist() for ids in g.completion_ids]) for g in chosen] == [("a", [[11]]), ("b", [[12]])]
        assert [g.cluster for g in chosen] == ["sea", ""]


def test_the_best_by_rank_then_score_and_only_if_good_enough() -> None:
    groups = [
        group("tied", ranks=(1.0, 1.0, 2.0), scores=(0.2, 0.9, 3.0)),
        group("half known", ranks=(1.0, 1.0), scores=(NAN, -0.5)),
        group("bad", ranks=(1.0, 2.0), scores=(-1.0, -2.0)),
        group("nothing known", ranks=(NAN, NAN), scores=(NAN, NAN)),
    ]
    everything = best_completions(groups, min_score=None)
    assert [(g.uid, int(g.completion_ids[0][0])) for g in everything] == [("tied", 11), ("half known", 11), ("bad", 10)]
    assert [g.uid for g in best_completions(groups, min_score=0.0)] == ["tied"]
    with pytest.raises(DataError, match="no ranks"):
        best_completions([group("unranked")], min_score=None)
