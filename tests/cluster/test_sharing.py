"""Roles on one GPU: which recipes are refused, and who makes room for whom in a whole step of the online loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from actors.parts import ENGINE_PARTS
from cluster.config import RunConfig
from cluster.sharing import PARTS, PHASES, build_gate, fleet_mover, refuse_scale
from rlhf.config import validate
from rlhf.errors import ConfigError, PlacementError, PublicationError
from rlhf.loops.online import train_online
from rlhf.loops.shared_gate import SharedGate
from rlhf.runs.timings import Timings
from rlhf.types import GroupHandle, Score
from tests.fakes import FakeRun, breathe, loop_config

SLEEPING = {"resources": {"gpus": 0.2}, "engine": {"enable_sleep": True}}


RULES = {"source": "rules", "rules": [{"rule": "repetition"}]}


def recipe(roles: dict[str, Any], gate: str = "shared", rewards: tuple[dict[str, Any], ...] = (RULES,)) -> RunConfig:
    online = {"kind": "rl", "rewards": rewards, "loop": {"steps": 1, "prompts_per_step": 2, "num_samples": 2}}
    document = {"name": "r", "model": "m", "gate": gate, "roles": roles, "data": {"train": {"path": "p.jsonl"}}}
    return validate(RunConfig, document | {"constitutions": {"training": "c.yaml"}, "stages": [online]}, "recipe")


def gpus(share: float, **fields: Any) -> dict[str, Any]:
    return {"resources": {"gpus": share}, **fields}


def test_roles_with_a_fraction_take_turns_and_others_are_left_alone() -> None:
    config = recipe({"generation": SLEEPING, "learner": gpus(0.5), "reference": gpus(1.0)})
    gate = build_gate(config)
    assert isinstance(gate, SharedGate)
    moved: list[str] = []

    async def body() -> None:
        async def move(parts: frozenset[str]) -> None:
            moved.append("generation")

        gate.join("generation", ENGINE_PARTS, move)
        async with gate.hold("reference"), gate.hold("scorer"):  # a GPU of its own, and a CPU
            assert not moved
        async with gate.hold("learner"):
            assert moved == ["generation"]

    asyncio.run(asyncio.wait_for(body(), 60.0))


def test_a_judge_makes_room_for_the_scorer_and_comes_back_for_its_own_phase() -> None:
    roles = {"generation": SLEEPING, "judge": SLEEPING, "scorer": gpus(0.2), "learner": gpus(0.2)}
    gate = build_gate(recipe(roles, rewards=({"source": "judge"},)))
    assert isinstance(gate, SharedGate)
    moves: list[Any] = []

    async def body() -> None:
        async def move(wanted: frozenset[str]) -> None:
            moves.append(wanted)

        gate.join("judge", ENGINE_PARTS, move)
        async with gate.hold("scorer"):
            assert moves == [frozenset()]
        async with gate.hold("judge"):
            assert moves == [frozenset(), ENGINE_PARTS]

    asyncio.run(asyncio.wait_for(body(), 60.0))


@pytest.mark.parametrize(
    ("roles", "complaint"),
    [
        pytest.param({}, "two roles or more with a fraction", id="no GPUs"),
        pytest.param({"generation": SLEEPING}, "two roles or more with a fraction", id="one role"),
        pytest.param({"generation": SLEEPING, "judge": SLEEPING}, "two roles or more", id="a role that no stage uses"),
        pytest.param({"generation": SLEEPING, "learner": gpus(0.9)}, "ask for 1.1 together", id="more than one GPU"),
        pytest.param({"generation": SLEEPING, "learner": gpus(0.2, ranks=2)}, "one actor of roles.learner", id="ranks"),
        pytest.param(
            {"generation": SLEEPING | {"replicas": 3}, "learner": gpus(0.2)}, "one actor of roles.gen", id="replicas"
        ),
        pytest.param({"generation": gpus(0.2), "learner": gpus(0.2)}, "enable_sleep: true", id="no sleep"),
    ],
)
def test_a_recipe_whose_roles_cannot_take_turns_is_refused(roles: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        recipe(roles)
    recipe(roles, gate="open")


def test_a_role_on_a_shared_gpu_cannot_be_scaled() -> None:
    roles = {"generation": SLEEPING, "learner": gpus(0.2)}
    refuse_scale(recipe(roles), "generation", 1)
    refuse_scale(recipe(roles), "scorer", 4)
    refuse_scale(recipe(roles, gate="open"), "generation", 4)
    with pytest.raises(PlacementError, match="shares its GPU"):
        refuse_scale(recipe(roles), "generation", 2)


def test_every_phase_of_a_step_finds_its_roles_in_memory_and_nobody_else() -> None:
    """The loop itself over fakes: who sleeps before who wakes, through two steps."""
    gate = SharedGate(PHASES)
    resident = {role: PARTS[role] for role in ("generation", "scorer", "critic", "learner")}
    moves: list[str] = []

    def join(role: str) -> None:
        async def move(parts: frozenset[str]) -> None:
            await breathe(1)
            resident[role] = parts
            moves.append(f"{role} {'+'.join(sorted(parts)) or 'aside'}")

        gate.join(role, PARTS[role], move)

    class Watched(FakeRun):
        async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
            async with gate.hold("scorer"):
                return await super().score(groups)

        async def _call(self, kind: str, detail: object) -> None:
            phase = {"generate": "generation", "score": "scorer", "annotate": "critic", "update": "learner"}.get(kind)
            if phase or kind == "publish":
                here = {role: parts for role, parts in resident.items() if parts}
                assert here == {r: p for r, p in PHASES[phase or kind].items() if r in resident}, kind
                moves.append(kind)
            await super()._call(kind, detail)

    for role in resident:
        join(role)
    run = Watched(gate=gate)
    asyncio.run(asyncio.wait_for(train_online(run.roles, loop_config(steps=2), run.hooks), 60.0))
    first = moves.index("publish") + 1
    assert moves[first : moves.index("publish", first) + 1] == [
        "learner aside",
        "generation kv_cache+weights",
        "generate",
        "generation aside",
        "scorer weights",
        "score",
        "scorer aside",
        "critic state+weights",
        "annotate",
        "critic aside",
        "learner state+weights",
        "update",
        "learner weights",
        "generation weights",
        "publish",
    ]


class BrokenFleet:
    """A fleet of which some replicas are lost when it is told to move."""

    role = "generation"

    def __init__(self, left: int) -> None:
        self.healthy = ["replica"] * 2
        self.num_missing = 0
        self.left = left
        self.calls: list[str] = []

    async def settled(self) -> None:
        """None of them is suspect."""

    async def broadcast(self, method: str, parts: list[str]) -> None:
        self.calls.append(" ".join([method, *parts]))
        self.healthy, self.num_missing = self.healthy[: self.left], 2 - self.left
        if not self.healthy:
            raise PublicationError("generation", found="no replica", needed="one", action="None.")

    async def repair(self) -> None:
        self.calls.append("repair")
        self.healthy, self.num_missing, self.left = ["replica"] * 2, 0, 2


@pytest.mark.parametrize("left", [0, 1, 2])
def test_lost_replicas_are_replaced_when_their_role_is_wanted_again_not_when_it_makes_room(left: int, tmp_path) -> None:
    fleet = BrokenFleet(left)
    move = fleet_mover(fleet, Timings(tmp_path / "timings.json"))  # type: ignore[arg-type]

    async def body() -> None:
        await move(frozenset())
        assert fleet.calls == ["reside"]
        await move(ENGINE_PARTS)
        assert len(fleet.healthy) == 2
        assert fleet.calls.count("repair") == (left < 2)

    asyncio.run(asyncio.wait_for(body(), 60.0))
