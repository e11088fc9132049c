"""What a stage takes over from a driver that was lost, and how kept replicas come into use. Ray itself is replaced."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.adoption import Adoption, adoptable
from cluster.config import RunConfig
from cluster.lease import _answering
from rlhf.config import validate
from rlhf.errors import EngineError

ALL = {"recorder", "generation", "scorer", "learner", "critic", "rules", "evaluator"}


def recipe(**changes: Any) -> RunConfig:
    rl = {
        "kind": "rl",
        "rewards": [{"source": "rules", "rules": [{"rule": "finished"}]}],
        "loop": {"steps": 1, "prompts_per_step": 1, "num_samples": 2},
    }
    plain = {"name": "t", "model": "m", "data": {"train": {"path": "p.jsonl"}}, "stages": [rl, {"kind": "evaluate"}]}
    return validate(RunConfig, plain | {"data": {n: {"path": "p"} for n in ("train", "evaluation")}} | changes, "test")


def test_engines_are_taken_over_and_learners_by_the_stage_that_loads_them() -> None:
    config = recipe()
    rl, evaluate = config.stages
    assert adoptable(config, rl, ALL) == {"recorder", "generation", "scorer", "learner", "critic"}
    assert adoptable(config, rl, {"generation", "rules"}) == {"generation"}
    assert adoptable(config, evaluate, ALL) == {"recorder", "generation", "scorer"}


class Places:
    """A placer with kept actors."""

    def __init__(self, kept: Sequence[str]) -> None:
        self.kept = list(kept)
        self.refused: list[str] = []

    def refuse(self, handle: str) -> None:
        self.refused.append(handle)


def test_a_kept_replica_that_cannot_take_the_weights_is_refused_and_the_others_serve() -> None:
    events: list[tuple[str, str]] = []
    placer, welcomed = Places(["a", "b", "c"]), []

    async def welcome(handle: str) -> None:
        if handle == "b":
            raise EngineError("b", found="a dead engine", needed="a living one", action="None.")
        welcomed.append(handle)

    adoption = Adoption(None, lambda kind, role, **_: events.append((kind, role)))
    asyncio.run(adoption.admit("generation", placer, welcome))  # type: ignore[arg-type]
    assert (welcomed, placer.refused) == (["a", "c"], ["b"])
    assert [kind for kind, _ in events] == ["replica_adopted", "replica_refused", "replica_adopted"]


def test_an_actor_that_is_just_being_restarted_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    restarting, dead = ActorUnavailableError("The actor is restarting.", b"0" * 16), ActorDiedError()
    answers: dict[str, list[Exception | None]] = {"a": [restarting, restarting, None], "b": [dead], "c": [None]}
    handles = {name: SimpleNamespace(abandon=SimpleNamespace(remote=functools.partial(str, name))) for name in answers}

    def find(name: str, namespace: str) -> Any:
        if name not in handles:
            raise ValueError(name)
        return handles[name]

    def get(ref: str, timeout: float) -> None:
        if (answer := answers[ref].pop(0)) is not None:
            raise answer

    monkeypatch.setattr(ray, "get_actor", find)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: None)
    monkeypatch.setattr(ray, "get", get)
    assert _answering(["a", "b", "c", "gone"]) == [("a", handles["a"]), ("c", handles["c"])]
    assert not any(answers.values())


@pytest.mark.parametrize(("num_inherited", "ended"), [(0, []), (2, [["rules"]])])
def test_what_a_stage_has_no_use_for_is_ended_and_told(num_inherited: int, ended: list[list[str]]) -> None:
    told: list[list[str]] = []
    lease = SimpleNamespace(num_inherited=num_inherited, end_unclaimed=lambda keep: ["rules"])
    adoption = Adoption(lease, lambda kind, roles: told.append(roles))  # type: ignore[arg-type]
    asyncio.run(adoption.end_unclaimed({"generation"}))
    assert told == ended
