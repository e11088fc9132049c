from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.frozen import FrozenWorker
from actors.reference import ReferenceWorker
from actors.scorer import NORMALISER_FILE, ScoreNormaliser, ScorerWorker
from actors.store import LocalStore
from actors.training_groups import fetch_group
from rlhf.errors import ConfigError, DataError
from rlhf.maths.packing import pack
from rlhf.models.forward import language_outputs
from rlhf.models.load import load_policy, load_scalar
from rlhf.models.settings import ModelConfig
from rlhf.types import Completion, GroupHandle, Prompt, Rollout, RolloutGroup, Score, TrainGroup, VersionSpan
from tests.rlhf.models.conftest import make_groups
from tests.tiny import build_tiny_model, draw_head


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    base = build_tiny_model(folder / "base")
    draw_head(load_scalar(ModelConfig(path=str(base), dtype="float32"))).save_pretrained(folder / "model")
    for file in base.glob("tokenizer*"):
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    return folder / "model"


def handle_of(group: TrainGroup, scores: tuple[Score, ...] = ()) -> GroupHandle:
    rollouts = tuple(
        Rollout(Completion(ids, np.zeros(len(ids), np.float32), "", "stop", (VersionSpan(0, 0, len(ids)),)))
        for ids in group.completion_ids
    )
    payload = RolloutGroup(Prompt(group.uid, (), tuple(group.prompt_ids.tolist())), rollouts)
    lengths = tuple(len(ids) for ids in group.completion_ids)
    return GroupHandle(group.uid, payload, len(group.prompt_ids), lengths, (0, 0), scores)


def test_scores_do_not_depend_on_the_batch_and_are_normalised(reward_model: Path) -> None:
    handles = [handle_of(group) for group in make_groups(5)]
    together = ScorerWorker(reward_model, LocalStore())
    together.start()
    alone = ScorerWorker(reward_model, LocalStore(), max_tokens_per_batch=1)
    alone.start()
    found = together.score(handles)
    for ours, theirs in zip(found, alone.score(handles), strict=True):
        assert [s.value for s in ours] == pytest.approx([s.value for s in theirs], abs=1e-5)
    raw = [score.value for scores in found for score in scores]
    ScoreNormaliser(mean=0.25, std=2.0).write(reward_model)
    normalised = ScorerWorker(reward_model, LocalStore())
    normalised.start()
    normal = [score for scores in normalised.score(handles) for score in scores]
    (reward_model / NORMALISER_FILE).unlink()
    assert [s.value for s in normal] == pytest.approx([(value - 0.25) / 2.0 for value in raw])
    assert [s.components["reward_model_raw"] for s in normal] == pytest.approx(raw)


def test_a_score_that_is_not_finite_is_missing(reward_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in reward_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    worker = ScorerWorker(broken, LocalStore())
    worker.start()
    for score in worker.score([handle_of(group) for group in make_groups(1)])[0]:
        assert score.value is None and "nan" in score.error


def test_a_language_model_is_no_reward_model(reward_model: Path) -> None:
    worker = ScorerWorker(reward_model.parent / "base", LocalStore())
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        worker.start()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"mean": 0, "std": 0}', '{"mean": NaN, "std": 1}', '{"mean": "x", "std": 1}']
)
def test_a_broken_normaliser_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / NORMALISER_FILE).write_text(text)
    with pytest.raises(ConfigError, match="finite mean and std"):
        ScoreNormaliser.read(tmp_path)


def test_no_normaliser_leaves_scores_alone(tmp_path: Path) -> None:
    assert ScoreNormaliser.read(tmp_path) == ScoreNormaliser(0.0, 1.0)
    ScoreNormaliser(1.5, 3.0).write(tmp_path)
    assert ScoreNormaliser.read(tmp_path) == ScoreNormaliser(1.5, 3.0)
    assert json.loads((tmp_path / NORMALISER_FILE).read_text()) == {"mean": 1.5, "std": 3.0}


def test_the_reference_annotates_its_own_log_probs(reward_model: Path) -> None:
    base = reward_model.parent / "base"
    groups = make_groups(4)
    worker = ReferenceWorker(base, LocalStore(), max_tokens_per_batch=64, temperature=0.5)
    worker.start()
    annotated = worker.annotate([replace(handle_of(g), annotations={"values": ()}) for g in groups])
    model = load_policy(ModelConfig(path=str(base), dtype="float32")).eval()
    for group, handle in zip(groups, annotated, strict=True):
        assert set(handle.annotations) == {"values", "reference_log_probs"}
        with torch.no_grad():
            wanted = language_outputs(model, pack([group], pad_id=0), temperature=0.5).log_probs
        for k, found in enumerate(handle.annotations["reference_log_probs"]):
            assert found.dtype == np.float32 and len(found) == len(group.completion_ids[k])
            np.testing.assert_allclose(found, wanted[k, : len(found)].numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("threads", "told", "taken"),
    [(None, "8", [48]), (None, "48", []), (None, None, []), (3, "8", [3])],
    ids=["another node", "the driver's node", "not told", "configured"],
)
def test_a_model_counts_the_cores_of_its_own_node(
    threads: int | None, told: str | None, taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Empty(FrozenWorker):
        def _load(self) -> torch.nn.Module:
            return torch.nn.Identity()

    found: list[int] = []
    monkeypatch.setattr("os.cpu_count", lambda: 48)
    monkeypatch.setattr("torch.set_num_threads", found.append)
    if told is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    Empty(tmp_path, LocalStore(), threads=threads, device="cpu").start()
    assert found == taken


def test_groups_come_out_of_the_store_with_scores_and_annotations() -> None:
    (group,) = make_groups(1, 2)
    values = tuple(np.ones(len(ids), np.float32) for ids in group.completion_ids)
    handle = replace(handle_of(group, (Score(1.5), Score(None, error="x"))), annotations={"values": values})
    found = fetch_group(handle, LocalStore())
    assert found.scores[0] == 1.5 and np.isnan(found.scores[1])
    assert found.values is values and found.reference_log_probs is None
    assert found.prompt_ids.dtype == np.int32 and found.prompt_ids.tolist() == group.prompt_ids.tolist()
    assert fetch_group(handle_of(group), LocalStore()).scores is None
    with pytest.raises(DataError, match="1 scores"):
        fetch_group(handle_of(group, (Score(1.0),)), LocalStore())
