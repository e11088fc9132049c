"""The run's context without Ray: a role is placed once, and fleets make room only where they must."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.settings import LearnerConfig
from cluster import context as module
from cluster import joining, placement
from cluster.config import RunConfig
from cluster.context import Policy, RunContext, TimedGate
from cluster.sharing import build_gate
from cluster.topology import NodeCapacity
from rlhf.config import validate
from rlhf.errors import ClusterError, PlacementError
from rlhf.loops.gate import BudgetGate, GatedSource
from rlhf.models.settings import ModelConfig
from rlhf.rewards.config import JudgePart, RewardModelPart, RulesPart
from rlhf.rewards.mixture import Mixture
from rlhf.rewards.rules import NonEmptyRule
from rlhf.runs.directory import RunDirectory
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.timings import Timings
from rlhf.types import GroupHandle, Score
from tests.fakes import make_group


class PlacedRole:
    """Stands for a ``Placer``: reserving takes a turn of the loop, as the real one's thread does."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.closed = False
        self.kept: list[Any] = []

    def spawn(self, worker: type, kwargs: Any, env: Any = None) -> Any:
        raise AssertionError("nothing is spawned in these tests")

    def retire(self, handle: Any) -> None:
        raise AssertionError("nothing is retired in these tests")

    def close(self) -> None:
        self.closed = True


class Cluster:
    """A cluster of one node, and what was placed on it."""

    def __init__(self) -> None:
        self.cpus = 8.0
        self.placed: list[PlacedRole] = []

    async def reserved(self, role: str, *args: Any, **options: Any) -> PlacedRole:
        await asyncio.sleep(0)
        self.placed.append(PlacedRole(role))
        return self.placed[-1]

    @property
    def held(self) -> list[str]:
        return [placer.role for placer in self.placed if not placer.closed]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()

    async def no_replicas(fleet: Any, wanted: int) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(module.Placer, "reserved", cluster.reserved)
    monkeypatch.setattr(module.Fleet, "scale", no_replicas)
    monkeypatch.setattr(module, "cluster_nodes", lambda: [NodeCapacity("a", cluster.cpus, 0.0)])
    return cluster


def open_run(tmp_path: Path, **changes: Any) -> RunContext:
    recipe: dict[str, Any] = {
        "name": "test",
        "model": "m",
        "constitutions": {"training": "c.yaml"},
        "data": {"train": {"path": "p.jsonl"}},
        "recorder": {"cpus": 0.5},
        "roles": {"learner": {"resources": {"cpus": 2.0}}},
        "stages": [{"kind": "feedback"}, {"kind": "reward"}],
    }
    config = validate(RunConfig, recipe | changes, "test")
    run = RunDirectory(tmp_path)
    return RunContext(
        config=config,
        run=run,
        start=Policy(tmp_path, 0),
        policy=Policy(tmp_path, 0),
        timings=Timings(run.timings),
        metrics=MetricsLogger(run.metrics, tensorboard=None),
        gate=build_gate(config),
        inputs={},
    )


class Worker:
    """No one is started."""


@pytest.mark.parametrize(
    ("cpus", "left"),
    [
        pytest.param(3.0, ["generation", "judge"], id="a learner beside both"),
        pytest.param(2.4, [], id="the learner needs their place"),
    ],
)
def test_fleets_make_room_for_a_stage_only_where_it_does_not_fit_beside_them(
    cpus: float, left: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    async def work() -> None:
        context = open_run(tmp_path)
        feedback, reward = context.config.stages
        cluster.cpus = cpus
        for role in ("generation", "judge"):
            await context.fleet(role, Worker, {})
        await context.make_room(feedback)
        assert cluster.held == ["generation", "judge"], "a stage keeps what it uses"
        await context.make_room(reward)
        assert cluster.held == left
        assert [context.has_fleet(role) for role in ("generation", "judge")] == [bool(left)] * 2
        if not left:
            await context.fleet("generation", Worker, {})  # a later stage starts it again
            assert cluster.held == ["generation"]
        await context.close()

    asyncio.run(work())


def test_a_role_that_is_asked_for_twice_at_once_is_placed_once(cluster: Cluster, tmp_path: Path) -> None:
    async def work() -> None:
        context = open_run(tmp_path)
        first, second = await asyncio.gather(context.fleet("scorer", Worker, {}), context.fleet("scorer", Worker, {}))
        assert first is second
        assert cluster.held == ["scorer"]
        await context.close()
        assert cluster.held == []

    asyncio.run(work())


def test_each_source_of_a_mixture_has_a_phase_of_its_own() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    class Source:
        def __init__(self, name: str, seconds: float) -> None:
            self.name = name
            self.seconds = seconds

        async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
            clock.now += self.seconds
            return [(Score(1.0),) * len(group.completion_lengths) for group in groups]

    clock = Clock()
    timings = Timings(clock=clock)
    gate = TimedGate(BudgetGate({"scorer": 1.0, "judge": 1.0}), timings, "rl")
    roles = {"reward_model": ("scorer", 2.0), "judge": ("judge", 5.0), "rules": ("rules", 1.0)}
    sources = [GatedSource(Source(name, seconds), gate, role) for name, (role, seconds) in roles.items()]
    parts = [RewardModelPart(source="reward_model"), JudgePart(source="judge")]
    parts.append(RulesPart(source="rules", rules=[NonEmptyRule(rule="non_empty")]))
    mixture = Mixture(sources, parts)
    (scores,) = asyncio.run(mixture.score([make_group("p0")]))
    assert [score.value for score in scores] == [3.0, 3.0]
    assert timings.totals() == {"rl": {"scorer": 2.0, "judge": 5.0, "rules": 1.0}}


def test_roles_on_one_gpu_take_turns_from_their_start_to_their_end(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[str, ...]] = []

    async def broadcast(fleet: module.Fleet, method: str, parts: list[str]) -> None:
        moves.append((fleet.role, method, *parts))

    monkeypatch.setattr(module.Fleet, "broadcast", broadcast)
    monkeypatch.setattr(module.Fleet, "healthy", ["a replica"])
    section = {"resources": {"gpus": 0.4}, "engine": {"enable_sleep": True}}

    async def work() -> None:
        roles = {"generation": section, "judge": section, "learner": {"resources": {"gpus": 0.2}}}
        context = open_run(tmp_path, gate="shared", roles=roles)
        await context.fleet("generation", Worker, {})
        assert moves == []
        await context.fleet("judge", Worker, {})
        assert moves == [("generation", "reside")], "room is made before the other one starts"
        async with context.gate.hold("generation"):
            assert moves[1:] == [("judge", "reside"), ("generation", "reside", "kv_cache", "weights")]
        await context.release("judge")
        async with context.gate.hold("learner"):
            assert moves[3:] == [("generation", "reside")], "training under Ray Train has the GPU to itself"
        await context.close()

    asyncio.run(asyncio.wait_for(work(), 60.0))


def test_a_learner_takes_the_runs_seed_and_the_stages_model_where_it_names_none(tmp_path: Path) -> None:
    context = open_run(tmp_path, seed=17)
    plain = context.at_policy(LearnerConfig())
    assert (plain.seed, plain.model.path) == (17, str(tmp_path))
    own = context.at_start(LearnerConfig(seed=0, model=ModelConfig(path="other")))
    assert (own.seed, own.model.path) == (0, "other")
    half = context.at(LearnerConfig(model=ModelConfig(path="other")), tmp_path)
    assert (half.seed, half.model.path) == (17, "other")


def test_a_cluster_that_others_use_is_refused_once_its_free_part_stays_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_run(tmp_path)  # the reward stage: a learner of 2 CPUs beside the recorder's half
    left = [{"CPU": 1.0, "object_store_memory": 9.0}, {}, {"CPU": 2.5}]
    asked: list[dict[str, float]] = []

    def available() -> dict[str, float]:
        asked.append(left.pop(0) if left else {"CPU": 2.4})
        return asked[-1]

    monkeypatch.setattr(placement.ray, "available_resources", available)
    asyncio.run(joining.wait_for_room(context.config, context.config.stages, timeout_s=30.0))
    assert len(asked) == 3, "what an earlier run held comes back"
    with pytest.raises(PlacementError) as caught:
        asyncio.run(joining.wait_for_room(context.config, context.config.stages, timeout_s=0.1))
    assert caught.value.exit_code == 3
    assert "stage reward: found 2.4 CPUs and 0 GPUs free in the whole cluster" in str(caught.value)
    assert "needed 2.5 CPUs and 0 GPUs" in str(caught.value)
    lease: Any = SimpleNamespace(held=lambda: NodeCapacity("this run", 0.1, 0.0))
    asyncio.run(joining.wait_for_room(context.config, context.config.stages, timeout_s=0.1, lease=lease))


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("answers", [True, False], ids=["too small", "no cluster"])
def test_what_a_cluster_refuses_leaves_no_new_run_directory(
    answers: bool, resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(*args: Any, **options: Any) -> None:
        if not answers:
            raise ClusterError("ray.address auto", found="nothing", needed="a cluster", action="Start one.")

    monkeypatch.setattr(joining, "connect", join)
    monkeypatch.setattr(joining, "disconnect", lambda: None)
    monkeypatch.setattr(joining, "cluster_nodes", lambda: [NodeCapacity("a", 1.0, 0.0)])
    config = open_run(tmp_path).config
    if resumed:
        RunDirectory.open(tmp_path / "run", config).close()

    async def work(run: RunDirectory) -> None:
        async with module.open_context(config, run, {}, config.stages):
            raise AssertionError("it does not fit")

    with (
        pytest.raises(PlacementError if answers else ClusterError),
        RunDirectory.open(tmp_path / "run", config) as run,
    ):
        asyncio.run(work(run))
    assert (tmp_path / "run").exists() == resumed
    assert (tmp_path / "run" / "config.yaml").exists() == resumed
