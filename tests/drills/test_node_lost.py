"""A run on a joined cluster loses, without grace, the node of each role in turn, and one learner rank."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.prompts import PromptCursor
from rlhf.types import Prompt
from tests.e2e import recipes
from tests.joined import JoinedCluster, joined_cluster

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, PROMPTS, SAMPLES, NUM_PROMPTS = 32, 4, 3, 16
SAVE_EVERY = 3
PLACES = ("generation", "reference", "learner", "recorder")
"""Each has a node of its own beside the head, where the driver and the run's keeper are."""
LOSSES = ("replica_lost", "gang_lost")
TITLES = ("GenerationWorker", "ReferenceWorker", "LearnerWorker", "RecorderWorker", "RulesWorker", "Keeper")


@dataclass
class Nodes:
    """The nodes of a cluster by what is placed on them."""

    cluster: JoinedCluster
    index: dict[str, int] = field(default_factory=lambda: {place: i for i, place in enumerate(PLACES, start=1)})

    def lose(self, place: str) -> float:
        """Ends a node, adds one with its label, and returns when the first was ended, seconds since the epoch."""
        began = time.time()
        self.cluster.remove(self.index[place])
        self.cluster.add(**node(place))
        self.index[place] = len(self.cluster.nodes) - 1
        return began


def node(place: str) -> dict[str, Any]:
    """What a node offers, and what it is called."""
    return {"num_cpus": 1, "labels": {"for": place}}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A cluster with a node for each place, and its token in the environment of what is started meanwhile."""
    with joined_cluster(node("head"), *map(node, PLACES)) as cluster:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, cluster.environment[name])
        yield Nodes(cluster)


@dataclass
class Losses:
    """What is lost while one driver goes on, one after the other, and what the events say of it.

    Attributes:
        path: The recipe.
        driver: The driver.
        tell: See ``conftest``.
    """

    path: Path
    driver: subprocess.Popen[str]
    tell: Callable[..., None]

    def of_replica(self, role: str, lose: Callable[[], float]) -> None:
        """What was lost is replaced, and steps are made again."""
        at = lose()
        self._wait_for("replica_joined", role, at)
        lost, joined = (self._told(kind, role, at)[0]["time"] - at for kind in ("replica_lost", "replica_joined"))
        what = f"the node of {'the ' if role != 'generation' else ''}{role} goes away without grace"
        self.tell(what, detect_s=lost, recover_s=joined, lost_steps=0)
        self.go_on()

    def of_gang(self, what: str, lose: Callable[[], float]) -> None:
        """The learners start again from a checkpoint, and steps are made again."""
        at = lose()
        self._wait_for("gang_restarted", "learner", at)
        [lost], [restarted] = (self._told(kind, "learner", at) for kind in ("gang_lost", "gang_restarted"))
        assert restarted["lost_steps"] <= SAVE_EVERY, "it is one checkpoint back at most"
        figures = {"detect_s": lost["time"] - at, "recover_s": restarted["time"] - at}
        self.tell(what, lost_steps=restarted["lost_steps"], **figures)
        self.go_on()

    def go_on(self) -> None:
        """Returns when two more steps are done."""
        logged = _num_logged(self._run)
        recipes.wait_for(self.driver, lambda: _num_logged(self._run) >= logged + 2, poll_s=0.01)

    @property
    def _run(self) -> Path:
        return self.path.parent / "run"

    def _wait_for(self, kind: str, role: str, after: float) -> None:
        recipes.wait_for(self.driver, lambda: bool(self._told(kind, role, after)))

    def _told(self, kind: str, role: str, after: float) -> list[dict[str, Any]]:
        return [event for event in recipes.events(self._run, kind) if event["role"] == role and event["time"] >= after]


@pytest.mark.timeout(1800)
def test_a_run_outlives_the_node_of_each_role(
    tmp_path: Path, tiny_model_dir: Path, nodes: Nodes, tell: Callable[..., None]
) -> None:
    """Generation's node, the reference's, a learner rank by SIGKILL, the learner's node, and then the recorder's, of
    one run; after each, a node with the same label is added.

    Passes if the driver outlives all of it and ends with 0; no replica or rank but those that were taken away is
    replaced; every step learned from the prompts of an undisturbed run, each once with all its siblings, drawn by that
    step's weights alone; and no process of the run is left.
    """
    recipes.write_data(tmp_path, num_prompts=NUM_PROMPTS)
    path = recipes.write_recipe(tmp_path, _recipe(tmp_path, tiny_model_dir, nodes.cluster.address))
    run = tmp_path / "run"

    def kill_rank() -> float:
        recipes.kill_worker(path, "ray::LearnerWorker")
        return time.time()

    with recipes.running(path) as driver:
        recipes.wait_for(driver, lambda: _num_logged(run) >= 1, poll_s=0.01)
        losses = Losses(path, driver, tell)
        losses.go_on()
        losses.of_replica("generation", lambda: nodes.lose("generation"))
        losses.of_replica("reference", lambda: nodes.lose("reference"))
        losses.of_gang("a learner rank is killed", kill_rank)
        losses.of_gang("the node of the learner goes away without grace", lambda: nodes.lose("learner"))
        before = Counter(event["role"] for kind in LOSSES for event in recipes.events(run, kind))
        losses.of_replica("recorder", lambda: nodes.lose("recorder"))
        assert driver.wait(900) == 0, recipes.log_of(path)
    _wait_until_gone(path)
    assert "Traceback" not in recipes.log_of(path)
    after = Counter(event["role"] for kind in LOSSES for event in recipes.events(run, kind))
    assert (after - before).keys() <= {"recorder", "rules"}, "nobody is blamed who was not on its node"
    _check_record(run)


def _check_record(run: Path) -> None:
    assert [line["step"] for line in recipes.metrics(run)] == list(range(1, STEPS + 1))
    cursor = PromptCursor([Prompt(f"p/{i}", (), ()) for i in range(NUM_PROMPTS)], seed=5)
    rows = recipes.table(run, "rollouts")
    expected = {step: {prompt.uid: SAMPLES for prompt in cursor.next_batch(PROMPTS)} for step in range(STEPS)}
    assert {step: Counter(row["uid"] for row in rows if row["step"] == step) for step in range(STEPS)} == expected
    assert len(rows) == STEPS * PROMPTS * SAMPLES
    assert {(row["step"], span["version"]) for row in rows for span in row["version_spans"]} == {
        (step, step) for step in range(STEPS)
    }


def _recipe(folder: Path, model: Path, address: str) -> dict[str, Any]:
    stage = {
        "kind": "rl",
        "select_best": False,
        "learner": recipes.learner(),
        "algorithm": {"name": "grpo", "policy": {"kl": {"coefficient": 0.01}}},
        "rewards": [{"source": "rules", "rules": [{"rule": "repetition", "n": 2}]}],
        "loop": {"steps": STEPS, "prompts_per_step": PROMPTS, "num_samples": SAMPLES, "checkpoint_every": SAVE_EVERY},
    }
    recipe = recipes.base(folder, model, [stage])
    recipe["sampling"] = {"max_tokens": 48, "ignore_eos": True}  # long enough to be lost in the middle
    for place in PLACES[:3]:
        recipe["roles"][place]["resources"]["labels"] = {"for": place}
    recipe["recorder"] = {"cpus": 0.1, "labels": {"for": "recorder"}}
    recipe["ray"] = {"address": address}
    return recipe


def _num_logged(run: Path) -> int:
    return len(recipes.metrics(run))


def _workers(recipe: Path) -> dict[str, list[int]]:
    """Processes of the run on the cluster, those of its engine included."""
    found = {title: recipes.workers(recipe, f"ray::{title}") for title in TITLES}
    return found | {"engine": recipes.workers(recipe, "VLLM::")}


def _wait_until_gone(recipe: Path, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any((left := _workers(recipe)).values()):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)
