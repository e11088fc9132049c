"""The boundary to Ray: what a failed call looks like on our side."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time

import pytest

from actors.calls import await_ref, gather_all, kill, stream
from actors.store import RayStore
from rlhf.errors import DataError, DeadlineError, ReplicaLostError, WorkerError

pytestmark = pytest.mark.engine


class Worker:
    """Does as it is told."""

    def __init__(self, owner=None) -> None:
        self.store = RayStore(owner)

    def echo(self, value):
        return value

    def refuse(self) -> None:
        raise DataError("rows.jsonl:3", found="no text", needed="some", action="Mend the line.")

    def divide(self) -> float:
        return 1 / 0

    def time_out(self) -> None:
        raise TimeoutError("the worker's own")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def put(self, value):
        return [self.store.put(value)]

    keep = put

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def ping(self) -> str:
        return "pong"


class Unbuilt(Worker):
    """Its constructor has a defect."""

    def __init__(self) -> None:
        raise KeyError("missing")


class Streamer:
    """An async worker whose stream breaks off."""

    async def numbers(self, count: int, error: str, seconds: float = 0.0):
        for number in range(count):
            await asyncio.sleep(seconds)
            yield number
        if error == "ours":
            raise DataError("row 3", found="a", needed="b", action="c")
        if error == "defect":
            raise KeyError("x")


@pytest.fixture(scope="module")
def worker(ray_cluster):
    """One worker for the tests that leave it alive and idle."""
    import ray

    handle = ray.remote(Worker).options(num_cpus=0.1).remote()
    yield handle
    kill(handle)


@pytest.fixture(scope="module")
def streamer(ray_cluster):
    """One for all streams: it is async, so that one which was given up holds no other up."""
    import ray

    handle = ray.remote(Streamer).options(num_cpus=0.1).remote()
    yield handle
    kill(handle)


@pytest.fixture
def actor(ray_cluster):
    """Makes workers that end with the test."""
    import ray

    made = []

    def make(worker, **kwargs):
        made.append(ray.remote(worker).options(num_cpus=0.1).remote(**kwargs))
        return made[-1]

    yield make
    for handle in made:
        kill(handle)


def ask(ref, timeout_s: float = 30.0):
    return asyncio.run(await_ref(ref, timeout_s=timeout_s, where="worker[0].call"))


def test_a_value_comes_back(worker) -> None:
    assert ask(worker.echo.remote([1, "a"])) == [1, "a"]


def test_an_error_of_ours_comes_back_as_it_was_raised(worker) -> None:
    with pytest.raises(DataError) as caught:
        ask(worker.refuse.remote())
    error = caught.value
    assert type(error) is DataError
    assert (error.where, error.exit_code) == ("rows.jsonl:3", 2)
    assert str(error) == "rows.jsonl:3: found no text; needed some. Mend the line."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert error.__cause__ is not error


def test_a_defect_of_the_worker_names_it_and_keeps_its_traceback(actor, worker) -> None:
    with pytest.raises(WorkerError, match=r"^worker\[0\]\.call: (.|\n)*in divide(.|\n)*ZeroDivisionError"):
        ask(worker.divide.remote())
    with pytest.raises(WorkerError, match=r"^worker\[0\]\.call: (.|\n)*KeyError: 'missing'"):
        ask(actor(Unbuilt).ping.remote())


def test_what_the_machine_did_to_a_worker_is_a_lost_replica(worker) -> None:
    with pytest.raises(ReplicaLostError, match="the worker's own"):
        ask(worker.time_out.remote())


def test_a_dead_worker_is_a_lost_replica(actor) -> None:
    worker = actor(Worker)
    with pytest.raises(ReplicaLostError, match=r"worker\[0\]\.call"):
        ask(worker.die.remote())
    with pytest.raises(ReplicaLostError):
        ask(worker.ping.remote())
    kill(worker)  # once more does no harm


def test_a_worker_that_does_not_answer_ends_in_a_deadline(actor) -> None:
    with pytest.raises(DeadlineError, match=r"worker\[0\]\.call"):
        ask(actor(Worker).sleep.remote(60.0), 0.3)


async def drain(refs, timeout_s: float = 30.0):
    found = []
    try:
        async for value in stream(refs, timeout_s=timeout_s, where="worker[0].numbers"):
            found.append(value)
    except Exception as error:  # noqa: BLE001 - any kind is what the tests look at
        return found, error
    return found, None


@pytest.mark.parametrize(("error", "kind"), [("", None), ("ours", DataError), ("defect", WorkerError)])
def test_a_stream_gives_what_it_has_and_then_its_error(streamer, error: str, kind) -> None:
    refs = streamer.numbers.options(num_returns="streaming").remote(3, error)
    found, caught = asyncio.run(drain(refs))
    assert found == [0, 1, 2]
    assert caught is None if kind is None else type(caught) is kind


def test_a_stream_ends_within_its_deadline(streamer) -> None:
    asyncio.run(drain(streamer.numbers.options(num_returns="streaming").remote(1, "")))  # it has started
    refs = streamer.numbers.options(num_returns="streaming").remote(100, "", 0.4)
    found, caught = asyncio.run(drain(refs, 2.0))
    assert found and found == list(range(len(found))), "what came in time is kept"
    assert type(caught) is DeadlineError


def test_gathering_ends_the_rest_when_one_fails() -> None:
    ended: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise ReplicaLostError("a", found="b", needed="c", action="d")

    async def go_on() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("go_on")

    async def body() -> None:
        with pytest.raises(ReplicaLostError):
            await gather_all([go_on(), fail()])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())
    assert ended == ["go_on"]


def test_a_small_value_lives_in_shared_memory_and_outlives_its_worker(actor, worker) -> None:
    import ray
    from ray.experimental import get_object_locations

    writer = actor(Worker, owner=worker)
    (ref,) = ask(writer.put.remote({"uid": "p0"}))
    place = get_object_locations([ref])[ref]
    assert place["node_ids"], "it was inlined into its owner"
    assert place["object_size"] < 1000

    with pytest.raises(ReplicaLostError):
        ask(writer.die.remote())
    assert ray.get(ref, timeout=10) == {"uid": "p0"}
    assert RayStore(timeout_s=10).get(ref) == {"uid": "p0"}
