"""A recorder whose process is killed while it is asked something: Ray starts it again, and nobody else is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.fleet import Fleet
from actors.health import HEALTH_GROUP
from actors.recorder import RecorderWorker
from actors.remote_recorder import RemoteRecorder
from actors.replicas import FleetLimits
from actors.roles import FleetGenerator, FleetScorer, StageRecorder
from actors.rules import RulesWorker
from actors.store import RayStore
from cluster.placement import Placer
from cluster.topology import Resources
from rlhf.errors import RecordError, RolloutsLostError, ValueLostError
from rlhf.loops.rollouts import Rollouts
from rlhf.rewards.rules import NonEmptyRule
from rlhf.runs.tables import read_table
from rlhf.types import GroupHandle, Prompt
from tests.actors.test_store import payload, until_lost
from tests.fakes import OpenGate, make_prompts

pytestmark = pytest.mark.engine

LIMIT_S = 240.0
SMALL = Resources(cpus=0.1, threads=1, start_timeout_s=90.0)


class Drawer:
    """A generation replica without an engine."""

    def __init__(self, store: RayStore) -> None:
        self._store = store

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def stream(self, prompts: Sequence[Prompt], num_samples: int, version: int, exact: bool) -> Any:
        for prompt in prompts:
            group = await asyncio.to_thread(self._store.put, payload(prompt.uid))
            yield GroupHandle(prompt.uid, group, 1, (2,), (version, version))


def pid_of(recorder: Any) -> int:
    """The process of an actor now."""
    import ray

    text: str = ray.get(recorder.stacks.options(concurrency_group=HEALTH_GROUP).remote(), timeout=60.0)
    return int(text.split(maxsplit=2)[1])


async def kill_in(recorder: Any, work: Awaitable[Any]) -> Any:
    """Kills the recorder once ``work`` is under way, which it cannot have answered then."""
    pid = await asyncio.to_thread(pid_of, recorder)
    os.kill(pid, signal.SIGSTOP)
    task = asyncio.ensure_future(work)
    await asyncio.sleep(1.0)
    assert not task.done()
    os.kill(pid, signal.SIGKILL)
    return await task


@dataclass
class Recorded:
    """A recorder as a run has it, with a fleet that draws and one that scores."""

    folder: Path
    remote: RemoteRecorder
    handle: Any
    generator: FleetGenerator
    scorer: FleetScorer
    fleets: list[Fleet]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def draw(self, *uids: str) -> list[GroupHandle]:
        """Groups of these prompts, owned by the recorder."""
        return await self.generator.generate([Prompt(uid, (), (1,)) for uid in uids], num_samples=1, version=0)

    def kinds(self) -> list[str]:
        """Of the events, without the starts of the fleets."""
        return [kind for kind, fields in self.events if kind != "replica_joined" or "replaces" in fields]


@pytest.fixture
def run(ray_cluster: None, tmp_path: Path) -> Iterator[Callable[[Callable[[Recorded], Awaitable[None]]], Recorded]]:
    """Runs a coroutine with a recorder and its users, ends them, and returns them; everybody lives to that end."""
    placers: list[Placer] = []

    def start(body: Callable[[Recorded], Awaitable[None]]) -> Recorded:
        events: list[tuple[str, dict[str, Any]]] = []

        def event(kind: str, **fields: Any) -> None:
            events.append((kind, fields))

        def fleet(role: str, worker: type, kwargs: dict[str, Any]) -> Fleet:
            placers.append(placer := Placer(role, SMALL, 2))
            return Fleet(role, lambda _: placer.spawn(worker, kwargs), placer.retire, event)

        async def work() -> Recorded:
            placers.append(placer := Placer("recorder", SMALL, 1, max_concurrency=4, restarts=True))
            made = {"run": tmp_path, "store": RayStore()}
            handle = await asyncio.to_thread(placer.spawn, RecorderWorker, made)
            store = RayStore(handle)
            drawers = fleet("generation", Drawer, {"store": store})
            rules = fleet("rules", RulesWorker, {"rules": [NonEmptyRule(rule="non_empty")], "store": store})
            remote = RemoteRecorder(handle, event, timeout_s=120.0)
            generator = FleetGenerator(drawers, lambda *_: None)
            scorer = FleetScorer("rules", rules, lambda *_: None)
            recorded = Recorded(tmp_path, remote, handle, generator, scorer, [drawers, rules], events)
            await remote.start()
            for one in recorded.fleets:
                await one.scale(2)
            replicas = [one.healthy for one in recorded.fleets]
            try:
                await body(recorded)
                assert [one.healthy for one in recorded.fleets] == replicas, "nobody is blamed for the recorder"
            finally:
                for one in recorded.fleets:
                    await one.stop()
            return recorded

        return asyncio.run(asyncio.wait_for(work(), LIMIT_S))

    yield start
    for placer in placers:
        placer.close()


def test_what_is_put_recorded_and_read_while_the_recorder_dies(
    run: Callable[[Callable[[Recorded], Awaitable[None]]], Recorded],
) -> None:
    async def body(recorded: Recorded) -> None:
        stage = StageRecorder(recorded.remote, "rl")
        before = await recorded.draw("p0", "p1")
        await stage.record(0, before)
        file = recorded.folder / "rollouts" / "rl.step_000000.parquet"
        written = file.read_bytes()

        drawn = await kill_in(recorded.handle, recorded.draw("p2", "p3"))  # nothing is drawn twice: what is put waits
        assert [group.uid for group in drawn] == ["p2", "p3"]
        await recorded.remote.look()
        await until_lost([group.payload for group in before])
        with pytest.raises(RolloutsLostError) as caught:
            await recorded.scorer.score([*before, *drawn])
        assert set(caught.value.uids) <= {"p0", "p1"}
        with pytest.raises(RolloutsLostError) as caught:
            await stage.record(0, [*before, *drawn])
        assert caught.value.uids == ("p0", "p1")
        assert file.read_bytes() == written, "what was on disk stays"
        await stage.record(1, drawn)
        assert [score.value for (score,) in await recorded.scorer.score(drawn)] == [1.0, 1.0]

        with pytest.raises(RolloutsLostError) as caught:  # the next process is asked, and has none of them
            await kill_in(recorded.handle, stage.record(2, drawn))
        assert set(caught.value.uids) <= {"p2", "p3"}
        assert not (recorded.folder / "rollouts" / "rl.step_000002.parquet").exists()

        back = await kill_in(recorded.handle, recorded.remote.call("read_groups", "rl", "step_000001"))
        assert [group.uid for group in back] == ["p2", "p3"]
        assert [score.value for (score,) in await recorded.scorer.score(back)] == [1.0, 1.0]

    recorded = run(body)
    assert recorded.kinds() == ["replica_lost", "replica_joined"] * 3
    assert {fields["role"] for kind, fields in recorded.events if kind == "replica_lost"} == {"recorder"}


def test_the_groups_of_a_step_are_drawn_again_and_recorded_once(
    run: Callable[[Callable[[Recorded], Awaitable[None]]], Recorded],
) -> None:
    async def body(recorded: Recorded) -> None:
        def event(kind: str, **fields: Any) -> None:
            recorded.events.append((kind, fields))

        rollouts = Rollouts(
            recorded.generator,
            OpenGate(),
            make_prompts(4),
            num_samples=1,
            max_missing_fraction=0.0,
            version=0,
            exact=True,
            where="step 0",
            event=event,
        )
        await rollouts.draw()
        os.kill(await asyncio.to_thread(pid_of, recorded.handle), signal.SIGKILL)
        await until_lost([group.payload for group in rollouts.groups])
        scores = await rollouts.over(recorded.scorer.score)
        assert [score.value for (score,) in scores] == [1.0] * 4
        stage = StageRecorder(recorded.remote, "rl")
        await rollouts.over(lambda groups: stage.record(0, groups))
        rows = read_table(recorded.folder / "rollouts" / "rl.step_000000.parquet")
        assert [row["uid"] for row in rows] == ["p0", "p1", "p2", "p3"]
        assert rollouts.drawn_again == {"p0", "p1", "p2", "p3"}
        await recorded.remote.look()

    again = [kind for kind in run(body).kinds() if kind != "rollouts_drawn_again"]
    assert again == ["replica_lost", "replica_joined"]


def test_one_that_has_no_restarts_left_is_ended_for_everybody_and_its_place_with_it(
    ray_cluster: None, tmp_path: Path
) -> None:
    placer = Placer("recorder", SMALL, 1, max_concurrency=4, restarts=True)
    handle = placer.spawn(RecorderWorker, {"run": tmp_path, "store": RayStore()})

    async def body() -> None:
        kinds: list[str] = []
        remote = RemoteRecorder(handle, lambda kind, **_: kinds.append(kind), limits=FleetLimits(max_restarts=0))
        await remote.start()
        kept = RayStore(handle).put("a value")
        with pytest.raises(RecordError, match="Run the same command again"):
            await kill_in(handle, remote.call("has_chunk", "ask", 0))
        assert kinds == ["replica_lost", "restarts_used_up"]
        with pytest.raises(RecordError, match="object store, put"):
            await asyncio.to_thread(RayStore(handle).put, "another")
        await until_lost([kept])
        with pytest.raises(ValueLostError):
            await asyncio.to_thread(RayStore(handle).get, kept)

    asyncio.run(asyncio.wait_for(body(), LIMIT_S))
    placer.close()
    assert_dead(handle)


def test_a_recorder_that_is_ended_in_order_is_not_started_again(ray_cluster: None, tmp_path: Path) -> None:
    placer = Placer("recorder", SMALL, 1, restarts=True)
    handle = placer.spawn(RecorderWorker, {"run": tmp_path, "store": RayStore()})
    pid = pid_of(handle)
    placer.close()
    assert_dead(handle)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60.0)


def assert_dead(handle: Any) -> None:
    """Ray gives an actor up for good, in its own time."""
    import ray

    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        try:
            ray.get(handle.ping.remote(), timeout=60.0)
        except ray.exceptions.ActorDiedError:
            return
        except ray.exceptions.ActorUnavailableError:
            pass
        time.sleep(0.2)
    raise AssertionError("the actor was started again")
