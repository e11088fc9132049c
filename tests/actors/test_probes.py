"""Probes of real actors: what hangs is found and replaced, what is busy is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.fleet import FleetLimits, ReplicaState
from actors.gang import LearnerGang
from actors.health import ProbedThread, observed
from actors.prober import FleetProber, GangProber, ProbeLimits, Prober
from cluster.autoscale import AutoscaleConfig, autoscale
from cluster.placement import Placer
from cluster.stalls import StallWatch
from cluster.topology import Resources
from rlhf.errors import LearnerError
from tests.actors.fleets import EchoFleet, Fault, items, until, workers_of

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]

LIMITS = ProbeLimits(every_s=0.1, timeout_s=3.0, stall_timeout_s=100.0)
PATIENT = FleetLimits(30.0, 600.0, 3)
"""A call's own timeout ends nothing in these tests."""


def drive(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await body()

    asyncio.run(bounded())


async def nobody_stalls(who: str, seconds: float) -> None:
    raise AssertionError(f"{who} made no progress for {seconds} s")


@contextlib.asynccontextmanager
async def probing(prober: Prober) -> AsyncIterator[None]:
    task = asyncio.create_task(prober.run())
    try:
        yield
    finally:
        task.cancel()
        [ended] = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended


def fields_of(echo: EchoFleet, kind: str) -> list[dict[str, Any]]:
    return [fields for found, fields in echo.events if found == kind]


def test_a_stopped_process_is_suspect_then_lost_and_its_work_goes_to_a_replacement() -> None:
    async def body() -> None:
        async with EchoFleet(limits=PATIENT) as echo:
            await echo.fleet.scale(1)
            [replica] = echo.fleet.healthy
            pid = (await echo.fleet.broadcast("seen"))[0]["pid"]
            async with probing(FleetProber(echo.fleet, LIMITS, nobody_stalls, in_loop=True)):
                work = asyncio.create_task(echo.fleet.scatter_stream("stream", items(3), 0.2))
                await until(lambda: echo.fleet.backlog < 3)
                os.kill(pid, signal.SIGSTOP)
                assert [answer.uid for answer in await work] == ["p0", "p1", "p2"]
            assert replica not in echo.fleet.present
            kinds = [kind for kind in echo.kinds() if kind != "redispatched"]
            assert kinds == ["replica_joined", "replica_suspect", "replica_lost", "replica_joined"]
            [lost], [_, joined] = fields_of(echo, "replica_lost"), fields_of(echo, "replica_joined")
            assert "no answer to two probes" in lost["error"]
            assert 2 * LIMITS.timeout_s <= lost["detect_s"] < joined["recover_s"] < PATIENT.call_timeout_s
            assert (joined["replica"], joined["replaces"]) == (1, 0)

    drive(body)


def test_a_suspect_that_goes_on_is_welcomed_to_the_weights_that_it_missed() -> None:
    async def body() -> None:
        async with EchoFleet(limits=PATIENT) as echo:
            await echo.fleet.scale(2)
            stopped, other = echo.fleet.healthy

            async def welcome(handle: Any) -> None:
                await handle.load.remote(7)

            echo.fleet.welcome = welcome
            pid = (await echo.fleet.broadcast("seen"))[0]["pid"]
            limits = ProbeLimits(every_s=0.1, timeout_s=5.0, stall_timeout_s=100.0)
            async with probing(FleetProber(echo.fleet, limits, nobody_stalls, in_loop=True)):
                os.kill(pid, signal.SIGSTOP)
                try:
                    await until(lambda: stopped.state is ReplicaState.SUSPECT, 30.0)
                    assert await echo.fleet.broadcast("load", 7) == [1]
                    assert workers_of(await echo.fleet.scatter("answer", items(2))) == [1, 1]
                finally:
                    os.kill(pid, signal.SIGCONT)
                await until(lambda: stopped.state is ReplicaState.HEALTHY, 30.0)
            assert [seen["version"] for seen in await echo.fleet.broadcast("seen")] == [7, 7]
            assert echo.kinds()[2:] == ["replica_suspect", "replica_recovered"]

    drive(body)


def test_work_without_progress_is_written_down_and_goes_to_another(tmp_path: Path) -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", "hang")}, PATIENT) as echo:
            await echo.fleet.scale(1)
            workers = {"echo[0]": echo.fleet.healthy[0].handle}
            watch = StallWatch(tmp_path, echo._event, 100.0, actors=lambda: workers, progress=lambda: 0)
            limits = ProbeLimits(every_s=0.1, timeout_s=30.0, stall_timeout_s=1.0)
            async with probing(FleetProber(echo.fleet, limits, watch.stalled, in_loop=True)):
                assert workers_of(await echo.fleet.scatter("answer", items(2))) == [1, 1]
        kinds = [kind for kind in echo.kinds() if kind not in ("redispatched", "replica_joined")]
        assert kinds == ["stalled", "replica_lost"], "the stacks come first"
        [stalled] = fields_of(echo, "stalled")
        text = (tmp_path / stalled["stacks"]).read_text()
        assert stalled["who"] == "echo[0]" and "=== driver" in text
        assert "_fail" in text[text.index("=== echo[0]") :], "where the worker waits"

    drive(body)


class SlowThread(ProbedThread):
    """Works in its one thread."""

    def start(self) -> None:
        """Answers when the worker is up."""

    def pid(self) -> int:
        return os.getpid()

    @observed
    def work(self, num_items: int) -> int:
        for _ in range(num_items):
            time.sleep(0.02)
            self.progress()
        return num_items


def test_a_gang_at_work_answers_and_ends_when_a_rank_is_stopped() -> None:
    async def body() -> None:
        placer = Placer("learner", Resources(cpus=0.1, threads=1, start_timeout_s=30.0), 2)
        placer.reserve()
        try:
            gang = LearnerGang("learner", [placer.spawn(SlowThread, {}) for _ in range(2)], timeout_s=600.0)
            pids = await gang.call("pid")
            prober = GangProber(gang, LIMITS, nobody_stalls)
            async with probing(prober):
                work = asyncio.create_task(gang.call("work", lambda rank: (100_000,)))
                await until(lambda: prober.num_done > 0, 30.0)
                seen = prober.num_done
                await until(lambda: prober.num_done > seen, 30.0)
                assert not work.done(), "the probes came through beside the work"
                os.kill(pids[1], signal.SIGSTOP)
                with pytest.raises(LearnerError, match=r"^learner\[1\]\.probe: found no answer to two probes"):
                    await work
            assert gang.detect_s >= 2 * LIMITS.timeout_s and gang.ranks == []
        finally:
            placer.close()

    drive(body)


def test_an_item_that_kills_its_worker_is_left_out_and_the_rest_arrives() -> None:
    async def body() -> None:
        async with EchoFleet(limits=PATIENT, poison="p2") as echo:
            await echo.fleet.scale(1)
            found = await echo.fleet.scatter_stream("stream", items(4), 0.05, may_lack=True)
            assert [answer.uid for answer in found] == ["p0", "p1", "p3"]
            assert [fields["uid"] for fields in fields_of(echo, "item_poisoned")] == ["p2"]
            assert len(echo.fleet.healthy) == 1 and "restarts_used_up" not in echo.kinds()
            assert echo.fleet._restarts.num_taken == 0

    drive(body)


def test_replicas_follow_the_load_up_and_down() -> None:
    async def body() -> None:
        async with EchoFleet(limits=PATIENT, size=1) as echo:
            await echo.fleet.scale(1)
            policy = AutoscaleConfig(max_replicas=2, target_items_per_replica=4, window_s=0.5, cooldown_s=0.5)
            scaler = asyncio.create_task(autoscale(echo.fleet, policy, echo._event, interval_s=0.05))
            stop = asyncio.Event()

            async def load() -> Sequence[Any]:
                answers: list[Any] = []
                while not stop.is_set():
                    answers += await echo.fleet.scatter_stream("stream", items(8), 0.02)
                return answers

            loads = [asyncio.create_task(load()) for _ in range(2)]
            await until(lambda: len(echo.fleet.healthy) == 2, 60.0)
            stop.set()
            answers = [answer for found in await asyncio.gather(*loads) for answer in found]
            assert len(answers) % 8 == 0
            await until(lambda: len(echo.fleet.healthy) == 1 and "replica_left" in echo.kinds(), 60.0)
            scaler.cancel()
            await asyncio.gather(scaler, return_exceptions=True)
            changes = [(fields["before"], fields["replicas"]) for fields in fields_of(echo, "autoscaled")]
            assert changes == [(1, 2), (2, 1)]
            assert not {"replica_lost", "redispatched", "scaling_failed"} & set(echo.kinds())

    drive(body)
