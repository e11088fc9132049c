"""Fleets on real Ray: shares, replacement, scaling under load, deadlines."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from actors.fleet import FleetLimits
from rlhf.errors import DataError, DeadlineError, EngineError, PublicationError, ReplicaLostError, WorkerError
from tests.actors.fleets import EchoFleet, Fault, items, until, workers_of

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]

LOST = ReplicaLostError("echo", found="a death", needed="a life", action="None.")
FAST = FleetLimits(start_timeout_s=30.0, call_timeout_s=1.5, max_restarts=3)


def drive(body) -> None:
    """Runs a test body with a bound of its own; no task of it may be left."""

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await body()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(bounded())


def test_items_go_out_in_contiguous_shares_and_come_back_in_order() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(3)
            for method in (echo.fleet.scatter, echo.fleet.scatter_stream):
                name = "answer" if method == echo.fleet.scatter else "stream"
                answers = await method(name, items(7))
                assert [answer.uid for answer in answers] == [f"p{i}" for i in range(7)]
                assert workers_of(answers) == [0, 0, 1, 1, 1, 2, 2]
                assert workers_of(await method(name, items(2))) == [0, 2]
                assert await method(name, []) == []

    drive(body)


@pytest.mark.parametrize("kind", ["kill", "engine", "timeout"])
def test_a_failed_replica_is_replaced_and_its_share_alone_goes_out_once_more(kind: str) -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", kind)}) as echo:
            await echo.fleet.scale(2)
            answers = await echo.fleet.scatter("answer", items(6))
            assert [answer.uid for answer in answers] == [f"p{i}" for i in range(6)]
            assert workers_of(answers) == [1] * 6, "the other one, at once"
            await echo.fleet.replaced()
            assert echo.kinds().count("replica_lost") == 1
            assert ("redispatched", {"role": "echo", "replica": 0, "num_items": 3}) in echo.events
            assert [replica.index for replica in echo.fleet.healthy] == [1, 2]

    drive(body)


def test_a_process_killed_from_outside_in_the_middle_of_a_call_loses_nothing() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(2)
            victim = (await echo.fleet.broadcast("seen"))[0]["pid"]
            work = asyncio.create_task(echo.fleet.scatter("answer", items(4), 1.0))
            await asyncio.sleep(0.3)
            os.kill(victim, signal.SIGKILL)
            assert workers_of(await work) == [1] * 4

    drive(body)


@pytest.mark.parametrize("kind", ["kill", "engine", "short"])
def test_what_a_stream_delivered_before_its_replica_failed_is_kept(kind: str) -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("stream", kind, after=2)}) as echo:
            await echo.fleet.scale(2)
            answers = await echo.fleet.scatter_stream("stream", items(8), 0.05)
            assert [answer.uid for answer in answers] == [f"p{i}" for i in range(8)]
            assert workers_of(answers) == [0, 0, 1, 1, 1, 1, 1, 1]
            assert ("redispatched", {"role": "echo", "replica": 0, "num_items": 2}) in echo.events

    drive(body)


def test_a_share_that_fails_twice_is_raised_and_the_others_are_let_go() -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", "engine"), 1: Fault("answer", "engine", after=1)}) as echo:
            await echo.fleet.scale(2)
            with pytest.raises(EngineError, match="dead engine") as caught:
                await echo.fleet.scatter("answer", items(2), 5.0)
            assert type(caught.value) is EngineError, "as the worker raised it, not mixed with Ray's own"
            assert all(replica.in_flight == 0 for replica in echo.fleet.healthy)

    drive(body)


def test_a_fault_in_what_was_asked_replaces_nobody() -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", "data")}) as echo:
            await echo.fleet.scale(1)
            with pytest.raises(DataError, match="prompt p0"):
                await echo.fleet.scatter("answer", items(2))
            assert "replica_lost" not in echo.kinds()

    drive(body)


@pytest.mark.parametrize(("method", "call"), [("scatter", "answer"), ("scatter_stream", "stream")])
def test_a_defect_of_the_worker_ends_the_call_and_replaces_nobody(method: str, call: str) -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault(call, "defect")}) as echo:
            await echo.fleet.scale(2)
            with pytest.raises(WorkerError, match=rf"^echo\[0\]\.{call}: found .*") as caught:
                await getattr(echo.fleet, method)(call, items(4))
            assert "KeyError: 'a defect of the worker'" in caught.value.found
            assert "fleets.py" in caught.value.found, "with its traceback"
            assert "replica_lost" not in echo.kinds()
            assert echo.kinds().count("replica_joined") == 2

    drive(body)


@pytest.mark.parametrize(("method", "call"), [("scatter", "answer"), ("scatter_stream", "stream")])
def test_a_hung_replica_ends_in_a_deadline(method: str, call: str) -> None:
    async def body() -> None:
        limits = FleetLimits(30.0, 1.5, max_restarts=0)
        async with EchoFleet({0: Fault(call, "hang")}, limits) as echo:
            await echo.fleet.scale(1)
            with pytest.raises(DeadlineError, match=rf"echo\[0\]\.{call}: found no answer"):
                await getattr(echo.fleet, method)(call, items(2))
            assert echo.fleet.healthy == []
            assert echo.kinds().count("replica_lost") == 1

    drive(body)


def test_a_hung_replica_is_replaced_like_a_dead_one() -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", "hang")}, FAST) as echo:
            await echo.fleet.scale(2)
            assert workers_of(await echo.fleet.scatter("answer", items(2))) == [1, 1]
            await echo.fleet.replaced()
            assert workers_of(await echo.fleet.scatter("answer", items(2))) == [1, 2]

    drive(body)


def test_restarts_are_bounded() -> None:
    async def body() -> None:
        limits = FleetLimits(30.0, 20.0, max_restarts=2)
        async with EchoFleet({i: Fault("answer", "kill") for i in range(9)}, limits) as echo:
            await echo.fleet.scale(1)
            for num_joined in (2, 3, 3):  # the share goes out twice; the third time nobody may be started
                with pytest.raises(ReplicaLostError):
                    await echo.fleet.scatter("answer", items(1))
                assert echo.kinds().count("replica_joined") == num_joined
            with pytest.raises(ReplicaLostError, match="no healthy replica"):
                await echo.fleet.scatter("answer", items(1))

    drive(body)


def test_replicas_that_die_in_their_first_start_are_started_again() -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("start", "kill"), 2: Fault("start", "engine")}) as echo:
            await echo.fleet.scale(2)
            assert [replica.index for replica in echo.fleet.healthy] == [1, 3]
            assert (echo.kinds().count("replica_lost"), echo.kinds().count("restart_failed")) == (1, 1)

    drive(body)


def test_actors_that_die_before_they_have_run_use_no_restarts() -> None:
    async def body() -> None:
        faults = {0: Fault("create", "kill", after=1), 1: Fault("create", "kill", after=2)}
        async with EchoFleet(faults, FleetLimits(80.0, 20.0, max_restarts=1)) as echo:
            await echo.fleet.scale(1)
            echo.fleet.lose(echo.fleet.healthy[0], LOST)
            await echo.fleet.replaced()
            assert [replica.index for replica in echo.fleet.healthy] == [1]
            assert echo.fleet._restarts.num_taken == 1 and "restart_failed" not in echo.kinds()
            assert echo.kinds().count("start_repeated") == 3

    drive(body)


def test_a_replacement_that_does_not_start_is_tried_again_while_restarts_are_left() -> None:
    async def body() -> None:
        faults = {0: Fault("answer", "kill"), 1: Fault("start", "kill"), 2: Fault("start", "engine")}
        async with EchoFleet(faults) as echo:
            await echo.fleet.scale(1)
            assert workers_of(await echo.fleet.scatter("answer", items(2))) == [3, 3]
            assert echo.kinds().count("restart_failed") == 2

    drive(body)


def test_a_replacement_whose_code_fails_at_its_start_is_not_tried_again() -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", "kill"), 1: Fault("start", "defect")}) as echo:
            await echo.fleet.scale(1)
            with pytest.raises(WorkerError, match=r"^echo\[1\]\.start"):
                await echo.fleet.scatter("answer", items(2))
            assert echo.kinds().count("restart_failed") == 1

    drive(body)


def test_a_start_that_fails_leaves_no_replica_and_no_demand() -> None:
    async def body() -> None:
        async with EchoFleet({2: Fault("start", "data")}) as echo:
            await echo.fleet.scale(1)
            with pytest.raises(DataError):
                await echo.fleet.scale(3)
            assert 0 in [replica.index for replica in echo.fleet.healthy]
            assert len(echo.fleet._replicas) == len(echo.fleet.healthy)
            assert echo.fleet.num_missing == 0
            await echo.fleet.scale(2)
            assert len(echo.fleet.healthy) == 2

    drive(body)


def test_scaling_up_and_down_under_load_loses_nothing_and_leavers_finish() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(1)
            done = 0
            stop = False

            async def load() -> None:
                nonlocal done
                while not stop:
                    answers = await echo.fleet.scatter_stream("stream", items(6), 0.05)
                    assert [answer.uid for answer in answers] == [f"p{i}" for i in range(6)]
                    await asyncio.sleep(0)
                    done += 1

            loads = [asyncio.create_task(load()) for _ in range(2)]
            for size in (3, 1, 2, 1):
                await echo.fleet.scale(size)
                assert len(echo.fleet.healthy) == size
                before = done
                await until(lambda before=before: done > before + 1)
            stop = True
            await asyncio.gather(*loads)
            assert "replica_lost" not in echo.kinds(), echo.events
            assert "redispatched" not in echo.kinds()
            assert echo.kinds().count("replica_left") == 3
            assert [replica.index for replica in echo.fleet.healthy] == [0]

    drive(body)


def test_a_leaver_is_chosen_after_its_share_was_sent_and_still_delivers_it() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(2)
            work = asyncio.create_task(echo.fleet.scatter("answer", items(4), 0.5))
            await asyncio.sleep(0)  # the shares are out, nothing has come back
            await echo.fleet.scale(1)
            assert workers_of(await work) == [0, 0, 1, 1]
            assert "replica_lost" not in echo.kinds()

    drive(body)


def test_a_leaver_that_hangs_does_not_hold_the_fleet_up() -> None:
    async def body() -> None:
        async with EchoFleet({1: Fault("answer", "hang")}, FAST) as echo:
            await echo.fleet.scale(2)
            work = asyncio.create_task(echo.fleet.scatter("answer", items(2)))
            await asyncio.sleep(0)
            await echo.fleet.scale(1)
            assert workers_of(await work) == [0, 0], "its share went to one that stays, and nobody was started for it"
            assert [replica.index for replica in echo.fleet.healthy] == [0]
            assert echo.kinds().count("replica_joined") == 2

    drive(body)


def test_a_leaver_that_dies_gives_its_share_to_one_that_stays() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(2)
            victim = (await echo.fleet.broadcast("seen"))[1]["pid"]
            work = asyncio.create_task(echo.fleet.scatter("answer", items(2), 1.0))
            await asyncio.sleep(0)
            leaving = asyncio.create_task(echo.fleet.scale(1))
            await asyncio.sleep(0.3)
            os.kill(victim, signal.SIGKILL)
            assert workers_of(await work) == [0, 0]
            await leaving
            assert [replica.index for replica in echo.fleet.healthy] == [0]

    drive(body)


def test_two_calls_on_a_dying_replica_share_one_replacement() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(1)
            victim = (await echo.fleet.broadcast("seen"))[0]["pid"]
            calls = [asyncio.create_task(echo.fleet.scatter("answer", items(2), 1.0)) for _ in range(3)]
            await asyncio.sleep(0.2)
            os.kill(victim, signal.SIGKILL)
            assert [workers_of(answers) for answers in await asyncio.gather(*calls)] == [[1, 1]] * 3
            assert echo.kinds().count("replica_lost") == 1
            assert echo.kinds().count("replica_joined") == 2

    drive(body)


def test_a_replica_that_dies_while_the_fleet_grows_is_not_replaced_twice() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(1)
            victim = (await echo.fleet.broadcast("seen"))[0]["pid"]
            work = asyncio.create_task(echo.fleet.scatter("answer", items(2), 1.0))
            await asyncio.sleep(0.1)
            growing = asyncio.create_task(echo.fleet.scale(3))
            os.kill(victim, signal.SIGKILL)
            answers = await work
            await growing
            assert {answer.uid for answer in answers} == {"p0", "p1"}
            assert len(echo.fleet.healthy) == 3

    drive(body)


def test_a_newcomer_is_welcomed_before_it_serves() -> None:
    async def body() -> None:
        async with EchoFleet({0: Fault("answer", "kill")}) as echo:
            await echo.fleet.scale(1)
            served: list[list[int]] = []

            async def welcome(handle) -> None:
                served.append([replica.index for replica in echo.fleet.healthy])
                await handle.load.remote(7)

            echo.fleet.welcome = welcome
            await echo.fleet.scatter("answer", items(1))  # replaced
            await echo.fleet.scale(2)  # joined
            assert served == [[], [1]]
            for seen in await echo.fleet.broadcast("seen"):
                assert seen["version"] == 7
                assert seen["calls"][:2] == ["start", "load"]

    drive(body)


def test_a_newcomer_whose_welcome_fails_never_serves() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(1)

            async def welcome(handle) -> None:
                raise PublicationError("weights", found="half", needed="all", action="Again.")

            echo.fleet.welcome = welcome
            with pytest.raises(PublicationError):
                await echo.fleet.scale(2)
            assert [replica.index for replica in echo.fleet.healthy] == [0]
            assert len(echo.fleet._replicas) == 1

    drive(body)


def test_a_broadcast_drops_who_fails_and_repair_replaces_them() -> None:
    async def body() -> None:
        async with EchoFleet({1: Fault("load", "engine"), 2: Fault("load", "kill")}) as echo:
            await echo.fleet.scale(3)
            assert await echo.fleet.broadcast("load", 5) == [0]
            assert [replica.index for replica in echo.fleet.healthy] == [0]
            assert echo.fleet.num_missing == 2
            await echo.fleet.repair()
            assert 0 in [replica.index for replica in echo.fleet.healthy], "it waits for none of them"
            await echo.fleet.replaced()
            assert [replica.index for replica in echo.fleet.healthy] == [0, 3, 4]

        async with EchoFleet({0: Fault("load", "engine")}) as echo:
            await echo.fleet.scale(1)
            with pytest.raises(PublicationError, match="dead engine"):
                await echo.fleet.broadcast("load", 5)

    drive(body)


def test_a_cancelled_call_leaves_the_replica_usable_and_idle() -> None:
    async def body() -> None:
        async with EchoFleet() as echo:
            await echo.fleet.scale(2)
            for delay in (0.0, 0.2):
                work = asyncio.create_task(echo.fleet.scatter_stream("stream", items(4), 0.2))
                await asyncio.sleep(delay)
                work.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await work
                await asyncio.sleep(0)
                assert all(replica.in_flight == 0 and replica.idle.is_set() for replica in echo.fleet.healthy)
            assert workers_of(await echo.fleet.scatter("answer", items(2))) == [0, 1]

    drive(body)


def test_stopping_ends_every_process() -> None:
    async def body() -> None:
        async with EchoFleet({1: Fault("stop", "data")}) as echo:
            await echo.fleet.scale(2)
            pids = {seen["pid"] for seen in await echo.fleet.broadcast("seen")}
        assert len(pids) == 2 and echo.fleet.healthy == []
        while left := {pid for pid in pids if _alive(pid)}:  # until they are gone, or ``drive`` gives up
            await asyncio.sleep(0.01)
        assert not left

    drive(body)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
