"""Groups that are no longer in the object store: named by uid, and no fault of whoever looked for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.dispatch import REPLACEABLE
from actors.recorder import RecorderWorker
from actors.remote_recorder import RemoteRecorder
from actors.roles import FleetScorer, StageRecorder
from actors.rules import RulesWorker
from actors.store import LocalStore, RayStore, fetch_all, fetch_payload
from actors.training_groups import fetch_group
from rlhf.errors import DeadlineError, RecordError, RolloutsLostError, StoreFullError, ValueLostError
from rlhf.rewards.rules import NonEmptyRule
from rlhf.types import Completion, GroupHandle, Prompt, Rollout, RolloutGroup, VersionSpan


class LossyStore(LocalStore):
    """What is None is gone."""

    def get(self, handle: Any) -> Any:
        if handle is None:
            raise ValueLostError("store", found="NodeDiedError: gone", needed="the value", action="Look.")
        return handle


def payload(uid: str) -> RolloutGroup:
    completion = Completion(
        np.array([5, 6], np.int32), np.zeros(2, np.float32), "text", "stop", (VersionSpan(0, 0, 2),)
    )
    return RolloutGroup(Prompt(uid, (), (1,)), (Rollout(completion),))


def handle(uid: str, there: bool = True, **annotations: Any) -> GroupHandle:
    return GroupHandle(uid, payload(uid) if there else None, 1, (2,), (0, 0), annotations=annotations)


def test_all_lost_groups_are_named_at_once_and_the_others_come_in_order() -> None:
    handles = [handle("a"), handle("b", there=False), handle("c"), handle("d", there=False)]
    with pytest.raises(RolloutsLostError, match="scorer: found no rollouts of 'b' and 1 more .NodeDiedError") as caught:
        fetch_all(handles, LossyStore(), fetch_payload, where="scorer")
    assert caught.value.uids == ("b", "d")
    found = fetch_all(handles[::2], LossyStore(), fetch_payload, where="scorer")
    assert [group.prompt.uid for group in found] == ["a", "c"]


def test_a_group_whose_annotation_is_gone_is_lost() -> None:
    handles = [handle("a", values=(np.zeros(2, np.float32),)), handle("b", values=None)]
    with pytest.raises(RolloutsLostError) as caught:
        fetch_all(handles, LossyStore(), fetch_group, where="learner")
    assert caught.value.uids == ("b",)


@pytest.mark.parametrize("kind", ["ObjectStoreFullError", "OutOfDiskError"])
@pytest.mark.parametrize("where", ["here", "at the owner"])
def test_a_store_without_room_says_what_to_raise(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    full = getattr(ray.exceptions, kind)("no room for 7 GiB")

    def refuse(*_: Any, **__: Any) -> None:
        raise full if where == "here" else ray.exceptions.RayTaskError("keep", "traceback", full).as_instanceof_cause()

    monkeypatch.setattr(ray, "put", refuse)
    monkeypatch.setattr(ray, "get", refuse)
    owner = None if where == "here" else SimpleNamespace(keep=SimpleNamespace(remote=lambda value: "ref"))
    with pytest.raises(StoreFullError, match="Raise ray.object_store_gib") as caught:
        RayStore(owner).put(1)
    assert kind in caught.value.found


def test_an_owner_that_is_gone_is_no_fault_of_the_replica_that_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    unreachable = [ray.exceptions.ActorUnavailableError("socket closed", b"0" * 16) for _ in range(3)]

    def refuse(*_: Any, **__: Any) -> None:
        raise unreachable.pop() if unreachable else ray.exceptions.ActorDiedError

    monkeypatch.setattr(ray, "get", refuse)
    monkeypatch.setattr("actors.store.time.sleep", lambda seconds: None)
    owner = SimpleNamespace(keep=SimpleNamespace(remote=lambda value: "ref"))
    with pytest.raises(RecordError, match="Run the same command again") as caught:
        RayStore(owner).put(1)
    assert not unreachable, "it is asked until it is known to be gone"
    assert not isinstance(caught.value, REPLACEABLE), "another replica would find it gone, too"


def test_an_owner_that_can_be_reached_again_takes_what_is_put(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    answers: list[Any] = [["handle"], ray.exceptions.ActorUnavailableError("socket closed", b"0" * 16)]

    def get(*_: Any, **__: Any) -> Any:
        if isinstance(answer := answers.pop(), Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("actors.store.time.sleep", lambda seconds: None)
    owner = SimpleNamespace(keep=SimpleNamespace(remote=lambda value: "ref"))
    assert RayStore(owner).put(1) == "handle"
    preempted = ray.exceptions.ActorDiedError()
    preempted._preempted = True  # as Ray tells it of a spot node, also for an actor that it restarts elsewhere
    answers += [["handle"], preempted]
    assert RayStore(owner).put(1) == "handle" and not answers
    answers += [ray.exceptions.ActorUnavailableError("socket closed", b"0" * 16)] * 9
    with pytest.raises(RecordError, match="object store, put") as caught:
        RayStore(owner, restart_timeout_s=0.0).put(1)
    assert not isinstance(caught.value, REPLACEABLE), "it stays away for every replica"


class Never:
    """A handle-like owner that takes nothing in time."""

    def keep(self, value: Any) -> list[Any]:
        import time

        time.sleep(60)
        return [value]


@pytest.fixture
def ray_module(ray_cluster: None) -> Any:
    import ray

    return ray


@pytest.mark.engine
def test_an_owner_that_does_not_answer_ends_in_a_deadline(ray_module: Any) -> None:
    owner = ray_module.remote(Never).options(num_cpus=0.1).remote()
    with pytest.raises(DeadlineError, match="object store, put"):
        RayStore(owner, timeout_s=0.2).put(1)
    ray_module.kill(owner)


async def until_lost(payloads: list[Any]) -> None:
    """Ray drops what a dead process owned in its own time."""
    while payloads:
        try:
            await asyncio.to_thread(RayStore(timeout_s=30.0).get, payloads[0])
            await asyncio.sleep(0.1)
        except ValueLostError:
            payloads.pop(0)


@pytest.mark.engine
def test_groups_that_left_the_object_store_are_named_and_no_replica_is_blamed(ray_module: Any, tmp_path: Path) -> None:
    from actors.fleet import Fleet
    from cluster.placement import Placer
    from cluster.topology import Resources

    ray = ray_module
    recorder = ray.remote(RecorderWorker).options(num_cpus=0.1).remote(tmp_path, RayStore())
    store = RayStore(recorder)
    doomed = ray.remote(RecorderWorker).options(num_cpus=0.1).remote(tmp_path, RayStore())  # its objects die with it
    events: list[str] = []
    placer = Placer("rules", Resources(cpus=0.1, threads=1, start_timeout_s=60.0), 2)
    rules = {"rules": [NonEmptyRule(rule="non_empty")], "store": store}

    async def body() -> None:
        fleet = Fleet(
            "rules",
            lambda _: placer.spawn(RulesWorker, rules),
            placer.retire,
            lambda kind, **_: events.append(kind),
        )
        scorer = FleetScorer("rules", fleet, lambda *_: None)
        try:
            await fleet.scale(2)
            owners = {"p0": store, "p1": store, "p2": RayStore(doomed), "p3": RayStore(doomed)}
            handles = [GroupHandle(uid, o.put(payload(uid)), 1, (2,), (0, 0)) for uid, o in owners.items()]
            assert [s.value for (s,) in await scorer.score(handles[:2])] == [1.0] * 2
            replicas = list(fleet.healthy)
            ray.kill(doomed)
            await until_lost([handle.payload for handle in handles[2:]])
            with pytest.raises(RolloutsLostError) as caught:
                await scorer.score(handles)
            assert caught.value.uids == ("p2", "p3")
            with pytest.raises(RolloutsLostError) as caught:
                await StageRecorder(RemoteRecorder(recorder), "rl").record(0, handles)
            assert caught.value.uids == ("p2", "p3")
            assert fleet.healthy == replicas and set(events) == {"replica_joined"}
            assert not list(tmp_path.rglob("*.parquet")), "half a step is not written"
            again = [GroupHandle(uid, store.put(payload(uid)), 1, (2,), (0, 0)) for uid in ("p2", "p3")]
            assert [s.value for (s,) in await scorer.score([*handles[:2], *again])] == [1.0] * 4
            await StageRecorder(RemoteRecorder(recorder), "rl").record(0, [*handles[:2], *again])
        finally:
            await fleet.stop()
            placer.close()
            ray.kill(recorder)

    asyncio.run(asyncio.wait_for(body(), 180))
    assert (tmp_path / "rollouts" / "rl.step_000000.parquet").is_file()
