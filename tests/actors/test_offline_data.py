"""What an offline stage learns from and what it leaves: no Ray, one rank whose whole state is a number."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.offline import OfflineJob, _Session, load_groups, read_results, reward_results
from actors.settings import LearnerConfig
from rlhf.data.groups import write_groups
from rlhf.data.supervised import SupervisedDataConfig
from rlhf.errors import CheckpointError, DataError
from rlhf.loops.offline import OfflineConfig
from rlhf.maths.packing import pack
from rlhf.models.settings import ModelConfig
from rlhf.objectives.base import ModelOutputs, TokenSignals
from rlhf.objectives.config import PreferenceConfig
from rlhf.objectives.preference import PreferenceObjective
from rlhf.runs import checkpoint
from rlhf.runs.places import FileEntry, not_saved, write_file
from rlhf.types import TrainGroup

NAN = math.nan


class OneRank:
    """Every completion's score is its first token; what is done is written down."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fails_to_save = False

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def save(self, place: str) -> dict[str, FileEntry]:
        entry = write_file(place, "half", [b"x"])
        if self.fails_to_save:
            raise not_saved(place, OSError(28, "No space left on device"))
        return {"half": entry}

    def export(self, directory: Path) -> None:
        self.done.append("export")
        (directory / "config.json").write_text("{}")

    def fit_normaliser(self, groups: list[TrainGroup]) -> None:
        self.done.append("normalise")

    def sequence_scores(self, groups: list[TrainGroup]) -> list[list[float]]:
        self.done.append("score")
        return [[float(ids[0]) for ids in group.completion_ids] for group in groups]


def make_job(folder: Path, kind: str, **changes: Any) -> OfflineJob:
    job = OfflineJob(
        kind=kind,
        learner=LearnerConfig(),
        objective=PreferenceConfig(),
        loop=OfflineConfig(),
        run_dir=folder,
        stage=kind,
        target=folder / "reward_model",
        groups=folder / "groups",
        records=None,
        held_out_fraction=0.25,
        min_score=None,
        max_sequence_tokens=200,
        seed=3,
        threads=1,
        temperature=1.0,
    )
    return dataclasses.replace(job, **changes)


def group(uid: str, ranks: tuple[float, ...] | None, tokens: tuple[int, ...] = (), cluster: str = "") -> TrainGroup:
    size = len(ranks or (1,))
    ids = tuple(np.array([token], np.int32) for token in tokens or range(20, 20 + size))
    return TrainGroup(uid, np.array([1, 2], np.int32), ids, ranks=ranks, cluster=cluster)


def test_people_who_replace_the_judge_give_a_warm_start_too(tmp_path: Path) -> None:
    groups = [group(f"p{i}", (2.0, 1.0), cluster=f"subject {i // 2}") for i in range(8)]
    write_groups(tmp_path / "groups" / "feedback_0000.parquet", groups)
    train, held_out = load_groups(make_job(tmp_path, "sft", min_score=0.5))
    assert (len(train), len(held_out)) == (6, 2)
    assert all([ids.tolist() for ids in g.completion_ids] == [[21]] for g in train + held_out)
    assert len({g.cluster for g in held_out}) == 1, "both prompts of a subject are held out"


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_what_a_killed_writer_left_is_not_learned_from(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "groups"
    write_groups(folder / "feedback_0000.parquet", [group(f"p{i}", (2.0, 1.0)) for i in range(4)])
    whole = (folder / "feedback_0000.parquet").read_bytes()
    (folder / ".tmp-x1-feedback_0000.parquet").write_bytes(whole)  # killed before the rename
    (folder / ".tmp-x2-feedback_0001.parquet").write_bytes(whole[: len(whole) // 2])
    train, _ = load_groups(make_job(tmp_path, kind, held_out_fraction=0.0))
    assert sorted(g.uid for g in train) == [f"p{i}" for i in range(4)]


def test_supervised_records_of_a_file(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"instruction": f"Question {i}", "output": f"Answer {i}", "subject": f"s{i // 2}"} for i in range(8)]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    job = make_job(
        tmp_path,
        "sft",
        records=SupervisedDataConfig(path=str(tmp_path / "records.jsonl")),
        learner=LearnerConfig(model=ModelConfig(path=str(tiny_model_dir))),
    )
    train, held_out = load_groups(job)
    assert (len(train), len(held_out)) == (6, 2)
    assert all(len(g.completion_ids) == 1 and g.ranks is None for g in train + held_out)
    assert not {g.cluster for g in train} & {g.cluster for g in held_out}
    short = dataclasses.replace(job, records=job.records.model_copy(update={"limit": 1}))
    with pytest.raises(DataError, match="found 1 records; needed at least 2. Add records"):
        load_groups(short)


@pytest.mark.parametrize("kind", ["preference", "reward"])
def test_pairs_come_from_rankings_and_a_tied_prompt_teaches_nothing(tmp_path: Path, kind: str) -> None:
    groups = [
        group("three", (2.0, 1.0, NAN)),
        group("tie inside", (1.0, 2.0, 2.0)),
        group("all tied", (1.0, 1.0)),
        group("one known", (NAN, 1.0)),
    ]
    write_groups(tmp_path / "groups" / "feedback_0000.parquet", groups)
    train, held_out = load_groups(make_job(tmp_path, kind, held_out_fraction=0.0))
    assert [g.uid for g in train] == ["three", "tie inside"] and held_out == []
    write_groups(tmp_path / "groups" / "feedback_0000.parquet", groups[1:])
    with pytest.raises(DataError, match="found 1 of 3 prompts .* rank count"):
        load_groups(make_job(tmp_path, kind))


def test_direct_preference_sees_just_the_stated_pairs(tmp_path: Path) -> None:
    write_groups(
        tmp_path / "groups" / "feedback_0000.parquet", [group("a", (2.0, 1.0, NAN)), group("b", (1.0, 2.0, 2.0))]
    )
    train, _ = load_groups(make_job(tmp_path, "preference", held_out_fraction=0.0))
    reference = [
        dataclasses.replace(g, reference_log_probs=tuple(np.zeros(1, np.float32) for _ in range(3))) for g in train
    ]
    batch = pack(reference, pad_id=0)
    signals = TokenSignals.from_groups(reference, batch)
    objective = PreferenceObjective(PreferenceConfig(beta=1.0))
    gains = torch.tensor([[1.0], [3.0], [50.0], [5.0], [4.0], [2.0]], dtype=torch.float64)
    result = objective.loss(ModelOutputs(log_probs=gains), batch, signals, objective.count(reference))
    # a: the second over the first; the third has no rank. b: the first over both others.
    expected = [-torch.nn.functional.logsigmoid(torch.tensor(gap, dtype=torch.float64)) for gap in (2.0, 1.0, 3.0)]
    assert float(result.loss) == pytest.approx(float((expected[0] + (expected[1] + expected[2]) / 2) / 2))


def test_a_trained_reward_model_is_there_before_it_is_measured(tmp_path: Path) -> None:
    worker = OneRank()
    held_out = [group("tied", (1.0, 1.0)), group("unknown", (NAN, 1.0))]
    job = make_job(tmp_path, "reward")
    trained = {"tokens": 300, "seconds": 2.0}
    _Session(job, worker, 0).finish(held_out, num_groups=6, trained=trained)
    assert worker.done == ["normalise", "export", "score"]
    assert (job.target / "config.json").is_file()
    nothing = {"held_out": ["tied", "unknown"], "pair_accuracy": None, "kendall_tau": None, "num_pairs": 0}
    assert read_results(job) == {"num_groups": 6, "num_held_out": 2, "trained": trained} | nothing


def test_reward_results_are_resampled_by_subject() -> None:
    held_out = [
        group(f"p{i}", (1.0, 2.0), tokens=(30, 20) if i % 4 < 2 else (20, 30), cluster=f"s{i // 2}") for i in range(16)
    ]
    found = reward_results(OneRank(), held_out)
    assert (found["pair_accuracy"]["mean"], found["num_pairs"]) == (0.5, 16)
    alone = reward_results(OneRank(), [dataclasses.replace(g, cluster="") for g in held_out])
    width, narrow = (found["pair_accuracy"][side] for side in ("high", "low")), alone["pair_accuracy"]
    high, low = width
    assert high - low > narrow["high"] - narrow["low"], "eight subjects say less than sixteen prompts"
    one_subject = reward_results(OneRank(), [dataclasses.replace(g, cluster="film") for g in held_out])
    assert one_subject["pair_accuracy"] == alone["pair_accuracy"]


def test_a_save_that_was_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    worker = OneRank()
    session = _Session(make_job(tmp_path, "reward"), worker, 0)
    folder = tmp_path / "checkpoints" / "reward"
    seen: list[list[str]] = []

    def looking(place: str) -> dict[str, FileEntry]:
        seen.append([path.name for path in folder.iterdir()])
        return {}

    worker.save = looking  # type: ignore[method-assign]
    session.hooks().checkpoint(4)
    del worker.save
    [[unfinished]] = seen
    (folder / unfinished).mkdir()  # as a kill at that moment leaves it
    found = checkpoint.load_latest(folder)
    assert found is not None and found.step == 4
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step_4"]
    worker.fails_to_save = True
    with pytest.raises(CheckpointError, match="No space left"):
        session.hooks().checkpoint(5)
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step_4"]
