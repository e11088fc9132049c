"""``rlhf submit`` to a real cluster of two nodes that asks for a token: sent, followed, sent again; the wrong token."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.config import parse_yaml
from tests.e2e import recipes
from tests.e2e.two_nodes import TwoNodes, two_nodes

PEOPLE = {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    with two_nodes() as nodes:
        yield nodes


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe whose data lie beside it and whose run goes to a folder that both nodes see."""
    recipes.write_data(folder)
    document = recipes.base(folder, model, [PEOPLE])
    for key in ("constitutions", "ray", "data"):
        del document[key]
    return recipes.write_recipe(folder, document | {"run_dir": "runs/people"})


def submit(cluster: TwoNodes, recipe: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    storage = ["--storage", str(recipe.parent / "shared")]
    return cluster.command("cluster.cli", "submit", str(recipe), "--address", cluster.dashboard, *storage, *flags)


@pytest.mark.engine
def test_a_run_is_sent_followed_and_found_complete(cluster: TwoNodes, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir)
    done = submit(cluster, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage feedback" in done.stdout
    run = tmp_path / "shared" / "runs" / "people"
    kept = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"), "config")
    [data] = [Path(stage["data"]["path"]) for stage in kept["stages"]]
    assert data.is_relative_to(run / "inputs") and data.read_bytes() == (tmp_path / "people.jsonl").read_bytes()
    assert len(recipes.table(run, "rankings")) == 16
    assert {"config.yaml", "summary.json", "report.html"} <= {path.name for path in run.iterdir()}
    assert not list(run.glob(".rlhf-probe-*")) and "Uploading" not in done.stderr

    again = submit(cluster, recipe)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "every stage is complete" in again.stdout
    listed = submit(cluster, recipe, "--status").stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [[line.split()[0], "SUCCEEDED"] for line in listed]
    assert len(listed) == 2, "one job for each"


@pytest.mark.engine
def test_whoever_has_another_token_is_refused(cluster: TwoNodes, tmp_path: Path, tiny_model_dir: Path) -> None:
    other = tmp_path / "token"
    other.write_text("fedcba9876543210" * 4, encoding="utf-8")
    other.chmod(0o644)
    stranger = TwoNodes(
        cluster.dashboard, cluster.gcs, cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(other)}, cluster.folder
    )
    done = submit(stranger, write_recipe(tmp_path, tiny_model_dir))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr and "fedcba98" not in done.stdout + done.stderr
    assert stat.S_IMODE(other.stat().st_mode) == 0o600, "a token that others could read is closed"
