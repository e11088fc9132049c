"""What the driver says of a run, from a context without Ray: status, counters, faults and an end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.fleet import Fleet
from actors.fleet_status import note_version
from actors.replicas import Replica, ReplicaState
from actors.telemetry import Instruments
from cluster.config import RunConfig
from cluster.context import Policy, RunContext
from cluster.observer import Observer
from cluster.sharing import build_gate
from cluster.telemetry import DRIVER_METRICS, METRICS, ClusterView, metrics_endpoints, targets_path
from rlhf.config import validate
from rlhf.errors import RecordError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.events import read_events
from rlhf.runs.files import read_json, write_text
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.progress import Steps
from rlhf.runs.status import RoleStatus, RunStatus, load_status
from rlhf.runs.timings import Timings
from tests.recorded import Recorded

VIEW = ClusterView(("10.0.0.1:9100",), 3 * 2**20, 2**30)


class Watched:
    """A run, its observer, and what that recorded."""

    def __init__(self, root: Path, loop: asyncio.Runner, view: Callable[[], ClusterView] = lambda: VIEW) -> None:
        self.loop = loop
        recipe: dict[str, Any] = {
            "name": "test",
            "model": "m",
            "constitutions": {"training": "c.yaml"},
            "data": {"train": {"path": "p.jsonl"}},
            "stages": [
                {"kind": "feedback"},
                {"kind": "reward"},
                {
                    "kind": "rl",
                    "rewards": [{"source": "judge"}],
                    "loop": {"steps": 5, "prompts_per_step": 2, "num_samples": 2},
                },
            ],
        }
        config = validate(RunConfig, recipe, "test")
        run = RunDirectory(root)
        self.context = RunContext(
            config=config,
            run=run,
            start=Policy(root, 0),
            policy=Policy(root, 0),
            timings=Timings(run.timings),
            metrics=MetricsLogger(run.metrics),
            gate=build_gate(config),
            inputs={},
        )
        self.recorded = Recorded()
        memory: Any = SimpleNamespace(memory_gib=1.0, peak_memory_gib=2.0)
        instruments = Instruments(DRIVER_METRICS, root.name, make=self.recorded.make)
        self.observer = Observer(self.context, memory, instruments, view=view)
        self.root = root

    def status(self) -> RunStatus:
        found = load_status(self.root)
        assert found is not None
        return found

    def value(self, name: str, **labels: str) -> float:
        return self.recorded.value(name, run=self.root.name, **labels)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine in the event loop of this run."""
        self.loop.run(work)

    def round(self) -> RunStatus:
        """What one more round writes."""
        self.run(self.observer.round())
        return self.status()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """Makes a run that is watched, in the test's folder."""
    with asyncio.Runner() as loop:
        yield lambda **options: Watched(tmp_path, loop, **options)


@pytest.fixture
def watched(watch: Callable[..., Watched]) -> Watched:
    return watch()


def a_fleet(watched: Watched, role: str = "generation") -> Fleet:
    fleet = Fleet(role, lambda index: None, lambda handle: None, watched.context.event)
    fleet._wanted = 2
    fleet._replicas += [Replica(0, state=ReplicaState.HEALTHY, in_flight=1), Replica(1)]
    watched.context._fleets[role] = fleet
    return fleet


def role_of(status: RunStatus, role: str) -> RoleStatus:
    [found] = [one for one in status.roles if one.role == role]
    return found


def test_a_status_shows_the_stage_and_how_far_it_is(watched: Watched) -> None:
    assert watched.round().stage is None
    watched.context.event("stage_started", stage="rl")
    watched.context.board.progress["rl"] = SimpleNamespace(steps=Steps(done=3, total=5, here=2, seconds=10.0))
    found = watched.round()
    assert found.stage is not None
    assert (found.stage.name, found.stage.done, found.stage.total, found.stage.seconds_left) == ("rl", 3, 5, 10.0)
    assert watched.value("rlhf_stage_done_ratio", stage="rl") == pytest.approx(0.6)
    watched.context.run.complete("rl", {})
    watched.context.event("stage_completed", stage="rl")
    found = watched.round()
    assert found.stage is None
    assert found.stages == {"feedback": False, "reward": False, "rl": True}


def test_a_role_shows_its_replicas_version_speed_and_restarts(watched: Watched) -> None:
    watched.context.timings.add_tokens("generation", 1000, 10.0)  # before the observer's first round, of this driver
    note_version(a_fleet(watched), 4)
    watched.round()
    watched.context.timings.add_tokens("generation", 600, 2.0)
    watched.context.event("replica_lost", role="generation", replica=1, error="x" * 5000)
    found = watched.round()
    role = role_of(found, "generation")
    assert (role.wanted, role.replicas, role.version, role.calls) == (2, {"healthy": 1, "starting": 1}, 4, 1)
    assert role.tokens_per_second == pytest.approx(300.0), "of its last piece of work"
    assert role.restarts == 1
    assert len(found.events[-1]["error"]) < 500
    assert watched.value("rlhf_replicas", role="generation", state="starting") == 1
    assert watched.value("rlhf_weight_version", role="generation") == 4
    assert watched.value("rlhf_tokens", role="generation") == 1600
    assert watched.value("rlhf_restarts", role="generation") == 1
    assert watched.value("rlhf_events", kind="replica_lost") == 1


def test_a_role_that_was_released_has_nothing_any_more(watched: Watched) -> None:
    a_fleet(watched)
    watched.round()
    del watched.context._fleets["generation"]
    assert watched.round().roles == []
    for state in ("healthy", "starting"):
        assert watched.value("rlhf_replicas", role="generation", state=state) == 0
    assert watched.value("rlhf_calls_in_flight", role="generation") == 0


def test_gangs_show_their_ranks_and_whether_they_are_at_work(watched: Watched) -> None:
    lock = SimpleNamespace(locked=lambda: True)
    gang: Any = SimpleNamespace(ranks=["r0"], lock=lock)
    watched.context.board.gangs["critic"] = gang
    watched.context.event("stage_started", stage="reward")  # its ranks are Ray Train's
    found = watched.round()
    assert (role_of(found, "critic").kind, role_of(found, "critic").calls) == ("gang", 1)
    assert role_of(found, "learner").replicas == {"healthy": 1}


def test_steps_come_from_the_record_whoever_wrote_them(watched: Watched) -> None:
    scores = {"rollout/score": 0.5, "rollout/score_std": 0.1, "rollout/missing_scores": 2.0, "rollout/staleness": 1.0}
    published = {"publish/seconds": 0.25, "publish/bytes": 1e6, "learner/skipped": 1.0, "learner/kl": float("nan")}
    watched.context.metrics.log("rl", 1, scores | published)
    time.sleep(0.01)
    watched.context.metrics.log("rl", 2, scores | published)
    watched.context.metrics.log("rl-validation", 2, {"validation/score": 0.75})
    found = watched.round()
    assert found.step is not None and found.validation is not None
    assert (found.step.stage, found.step.step, found.step.metrics["learner/kl"]) == ("rl", 2, None)
    assert found.step.seconds is not None and found.step.seconds > 0
    assert (found.validation.stage, found.validation.step) == ("rl", 2)
    expected = {"rlhf_steps": 2, "rlhf_missing_scores": 4, "rlhf_skipped_updates": 2, "rlhf_score_mean": 0.5}
    expected |= {"rlhf_score_std": 0.1, "rlhf_staleness_updates": 1, "rlhf_validation_score": 0.75}
    assert {name: watched.value(name, stage="rl") for name in expected} == expected
    assert watched.value("rlhf_publication_seconds") == 0.25
    assert watched.value("rlhf_publication_bytes") == 1e6
    assert watched.value("rlhf_training", stage="rl", scalar="rollout/score") == 0.5
    assert all(labels["scalar"] != "learner/kl" for labels in watched.recorded.labels("rlhf_training"))


def test_a_record_that_is_cut_back_is_not_counted_again(tmp_path: Path, watch: Callable[..., Watched]) -> None:
    MetricsLogger(tmp_path / "metrics.jsonl").log("rl", 1, {"rollout/score": 0.1})
    watched = watch()
    watched.round()
    for step in (2, 3):
        time.sleep(0.01)
        watched.context.metrics.log("rl", step, {"rollout/score": 0.1 * step})
    watched.round()
    assert watched.value("rlhf_steps", stage="rl") == 2
    watched.context.metrics.resume("rl", 2)  # a gang restarts: the file is replaced
    time.sleep(0.01)
    watched.context.metrics.log("rl", 3, {"rollout/score": 0.9})
    found = watched.round()
    assert watched.value("rlhf_steps", stage="rl") == 3
    assert found.step is not None and found.step.metrics["rollout/score"] == 0.9


def test_seconds_and_tokens_of_earlier_drivers_are_not_counted(tmp_path: Path, watch: Callable[..., Watched]) -> None:
    earlier = Timings(tmp_path / "timings.json")
    earlier.add("rl/generation", 50.0)
    earlier.add_tokens("judge", 100, 5.0)
    earlier.write()
    watched = watch()
    watched.context.timings.add("rl/generation", 2.0)
    watched.context.timings.add("rl/checkpoint", 3.0)
    watched.round()
    assert watched.value("rlhf_phase_seconds", stage="rl", phase="generation") == pytest.approx(2.0)
    assert watched.value("rlhf_checkpoint_seconds", stage="rl") == pytest.approx(3.0)
    assert watched.recorded.labels("rlhf_tokens") == []


def test_the_cluster_tells_its_object_stores_and_where_metrics_are(watched: Watched) -> None:
    async def until_seen() -> None:
        for _ in range(200):
            await watched.observer.round()
            if watched.status().memory.object_store is not None:
                return
            await asyncio.sleep(0.01)

    watched.run(until_seen())
    found = watched.status()
    assert (found.memory.object_store, found.memory.object_store_capacity) == (3 * 2**20, 2**30)
    assert found.memory.driver_machine_peak == 2 * 2**30
    assert found.metrics_endpoints == ["10.0.0.1:9100"]
    assert read_json(targets_path(watched.root)) == [{"labels": {"job": "rlhf"}, "targets": ["10.0.0.1:9100"]}]
    assert watched.value("rlhf_object_store_bytes") == 3 * 2**20


def test_a_cluster_that_does_not_answer_holds_nothing_up(watch: Callable[..., Watched]) -> None:
    asked = []

    def never() -> ClusterView:
        asked.append(1)
        raise ConnectionError("the cluster's head is away")

    watched = watch(view=never)

    async def go() -> None:
        running = asyncio.create_task(watched.observer.run())
        while not asked:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        with contextlib.suppress(ConnectionError):  # what it was asked first
            await watched.observer.round()
        await watched.observer.round()

    watched.run(go())
    assert watched.status().memory.object_store is None


def test_a_status_that_cannot_be_written_is_told_once_and_ends_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[RunStatus] = []

    def full(root: Path, status: RunStatus) -> None:
        tries.append(status)
        raise RecordError(str(root), found="a full disk", needed="space", action="Free some.")

    monkeypatch.setattr("cluster.observer.write_status", full)
    monkeypatch.setattr("cluster.observer.INTERVAL_S", 0.01)

    async def go() -> None:
        running = asyncio.create_task(watched.observer.run())
        while len(tries) < 3:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await watched.observer.close()

    watched.run(go())
    kinds = [event["kind"] for event in read_events(watched.context.run.events.path)]
    assert kinds == ["status_lost"]


def test_the_end_is_written_down(watched: Watched) -> None:
    watched.round()
    write_text(targets_path(watched.root), "[1]")
    watched.context.event("stopped", signal="SIGTERM")
    watched.run(watched.observer.close())
    found = watched.status()
    assert found.ended and found.roles == []
    assert found.events[-1]["kind"] == "stopped"
    assert watched.value("rlhf_driver_up") == 0
    assert read_json(targets_path(watched.root)) == [], "nobody asks a cluster that is gone"


def test_endpoints_are_those_of_living_nodes_with_metrics() -> None:
    def node(address: str, port: int, alive: bool = True) -> dict[str, Any]:
        return {"NodeManagerAddress": address, "MetricsExportPort": port, "Alive": alive}

    nodes = [node("10.0.0.2", 1), node("10.0.0.1", 2), node("10.0.0.3", 3, alive=False), node("10.0.0.4", -1)]
    assert metrics_endpoints([*nodes, node("fe80::1", 5)]) == ("10.0.0.1:2", "10.0.0.2:1", "[fe80::1]:5")


def test_names_are_plain_and_each_is_there_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("rlhf_") and not name.endswith("_total") for name in names)
