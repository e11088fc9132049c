"""The policy of a run is that of its last complete stage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.finish import keep_policy


def run_with(root: Path, *done: str) -> tuple[Any, Any]:
    """A recipe of two stages, of which some have left a policy with their name in it."""
    for name in done:
        (root / name / "policy").mkdir(parents=True, exist_ok=True)
        (root / name / "policy" / "model.safetensors").write_text(name, encoding="utf-8")
    config = SimpleNamespace(stages=[SimpleNamespace(name="first"), SimpleNamespace(name="second")])
    run = SimpleNamespace(
        root=root,
        policy=root / "policy",
        is_complete=lambda name: name in done,
        results=lambda name: {"policy": f"{name}/policy", "version": 3},
    )
    return config, run


def test_the_last_complete_stage_gives_the_run_its_policy(tmp_path: Path) -> None:
    keep_policy(*run_with(tmp_path))
    assert not (tmp_path / "policy").exists()
    for done in (["first"], ["first", "second"], ["first", "second"]):
        keep_policy(*run_with(tmp_path, *done))
        assert (tmp_path / "policy" / "model.safetensors").read_text(encoding="utf-8") == done[-1]
        assert not list(tmp_path.glob(".*")), "nothing unfinished stays"
    assert (tmp_path / "first" / "policy" / "model.safetensors").read_text(encoding="utf-8") == "first"
