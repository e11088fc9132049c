"""What a job looks at on the cluster before its driver starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import job_setup, storage
from cluster.config import load_run_config
from cluster.job_setup import check_key
from cluster.storage import look, wait_for_text
from rlhf.errors import ConfigError
from tests.cluster.test_shipping import write_recipe

ROOT = Path(__file__).resolve().parents[2]


def judged_recipe(folder: Path) -> Path:
    return write_recipe(
        folder,
        run_dir=str(folder / "runs" / "film"),
        roles={"judge": {"endpoint": {"base_url": "http://judge/v1", "model": "m"}}},
        constitutions={"training": str(ROOT / "configs/constitutions/film_reviews.yaml")},
        data={"train": {"path": "people.jsonl"}},
        stages=[{"kind": "feedback", "num_prompts": 4}, {"kind": "reward"}],
    )


def test_a_key_that_the_cluster_has_not_is_told_before_anything_starts(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("RLHF_JUDGE_API_KEY", raising=False)
    judged_recipe(tmp_path)
    assert job_setup.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "RLHF_JUDGE_API_KEY" in err and "before `ray start`" in err


def test_a_key_that_is_there_is_not_shown(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RLHF_JUDGE_API_KEY", "sk-very-secret-0123456789")
    check_key(load_run_config(judged_recipe(tmp_path)))
    assert capsys.readouterr() == ("", "")


def test_the_files_come_after_the_checks(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = judged_recipe(tmp_path)
    (tmp_path / "inputs" / "abc").mkdir(parents=True)
    (tmp_path / "inputs" / "abc" / "data.jsonl").write_text("{}", encoding="utf-8")
    monkeypatch.delenv("RLHF_JUDGE_API_KEY", raising=False)
    assert job_setup.main([str(recipe.parent)]) == 2
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("RLHF_JUDGE_API_KEY", "key")
    assert job_setup.main([str(recipe.parent)]) == 0
    assert (tmp_path / "runs/film/inputs/abc/data.jsonl").is_file()


def test_a_run_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "inputs" / "abc").mkdir(parents=True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="run_dir"):
        job_setup.lay_inputs(tmp_path / "inputs", tmp_path / "file" / "inputs")


def test_a_node_answers_what_it_sees(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "SEEN_WITHIN_S", 0.1)
    assert "not seen" in look(str(tmp_path), "word", "node")
    (tmp_path / "driver").write_text("word", encoding="utf-8")
    assert look(str(tmp_path), "word", "node") == ""
    assert wait_for_text(tmp_path / "node") == "word"
    assert "not seen" in look(str(tmp_path), "another run's", "node")
    assert "cannot write" in look(str(tmp_path), "word", "no/folder")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="at the driver's node"):
        storage.check_shared(tmp_path / "file")


@pytest.mark.engine
def test_all_nodes_of_a_cluster_are_asked(ray_cluster: None, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "runs").mkdir()
    assert storage.check_shared(tmp_path / "runs") == 1
    assert list((tmp_path / "runs").iterdir()) == [], "no probe is left"
    monkeypatch.setattr(storage, "look", lambda *_: "what the driver wrote is not seen there")
    with pytest.raises(ConfigError, match="node .* what the driver wrote is not seen"):
        storage.check_shared(tmp_path / "runs")
    assert os.listdir(tmp_path / "runs") == []
