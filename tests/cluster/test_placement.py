"""Placement on real Ray: places are reused and given back, and no child of a killed worker is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cluster.placement import Placer
from cluster.topology import Resources
from cluster.watchdog import CLUSTER_MARK
from rlhf.errors import PlacementError

pytestmark = pytest.mark.engine


class Worker:
    """Says where it is, and what it was started with."""

    def about(self) -> dict[str, object]:
        import ray

        context = ray.get_runtime_context()
        group = ray.util.get_current_placement_group()
        return {
            "pid": os.getpid(),
            "group": group.id.hex(),
            "cpus": context.get_assigned_resources().get("CPU"),
            "env": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "RLHF_RUN_MARKER", "EXTRA")},
        }

    def spawn_child(self) -> int:
        return subprocess.Popen(["sleep", "1000"]).pid


def placed(role: str, resources: Resources, count: int) -> Placer:
    placer = Placer(role, resources, count)
    placer.reserve()
    return placer


def free_cpus() -> float:
    import ray

    return ray.available_resources().get("CPU", 0.0)


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)


@pytest.fixture
def cluster(ray_cluster):
    wait_for(lambda: free_cpus() == 4.0)  # what an earlier test held is back
    yield
    wait_for(lambda: free_cpus() == 4.0)


@pytest.mark.usefixtures("cluster")
def test_actors_take_reserved_places_and_a_retired_place_is_used_again() -> None:
    import ray

    placer = placed("judge", Resources(cpus=0.5, threads=3), 2)
    wait_for(lambda: free_cpus() == 3.0)  # reserved before anything runs; Ray tells it a little later
    first, second = (placer.spawn(Worker, {}, {"EXTRA": "x"}) for _ in range(2))
    about = ray.get([first.about.remote(), second.about.remote()], timeout=30)
    assert {a["group"] for a in about} == {about[0]["group"]}
    assert about[0]["cpus"] == 0.5
    assert about[0]["env"] == {"OMP_NUM_THREADS": "3", "RLHF_RUN_MARKER": os.environ["RLHF_RUN_MARKER"], "EXTRA": "x"}

    ray.kill(first)
    placer.retire(first)
    placer.retire(first)  # once more does no harm
    third = placer.spawn(Worker, {})
    assert ray.get(third.about.remote(), timeout=30)["group"] == about[0]["group"]
    wait_for(lambda: free_cpus() == 3.0)

    joined = placer.spawn(Worker, {})
    assert ray.get(joined.about.remote(), timeout=30)["group"] != about[0]["group"]
    wait_for(lambda: free_cpus() == 2.5)
    ray.kill(joined)
    placer.retire(joined)
    wait_for(lambda: free_cpus() == 3.0)

    placer.close()
    wait_for(lambda: free_cpus() == 4.0)
    wait_for(lambda: not any(Path(f"/proc/{a['pid']}").exists() for a in about))


@pytest.mark.usefixtures("cluster")
def test_what_does_not_fit_says_so_within_its_bound_and_keeps_nothing() -> None:
    with pytest.raises(PlacementError, match=r"role scorer: found no room for 2 x .* in 1 s") as caught:
        placed("scorer", Resources(cpus=3, start_timeout_s=1.0), 2)
    assert caught.value.exit_code == 3
    assert free_cpus() == 4.0

    placer = placed("scorer", Resources(cpus=3, start_timeout_s=1.0), 1)
    placer.spawn(Worker, {})
    with pytest.raises(PlacementError):
        placer.spawn(Worker, {})
    placer.close()


@pytest.mark.usefixtures("cluster")
def test_closing_ends_a_wait_for_room() -> None:
    import threading

    placer = placed("scorer", Resources(cpus=3, start_timeout_s=60.0), 1)
    placer.spawn(Worker, {})
    errors: list[Exception] = []

    def join() -> None:
        try:
            placer.spawn(Worker, {})
        except PlacementError as error:
            errors.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    time.sleep(0.5)
    placer.close()
    thread.join(30)  # the wait itself would take longer
    assert not thread.is_alive()
    assert len(errors) == 1


@pytest.mark.usefixtures("cluster")
def test_waiting_for_room_holds_nothing_up_and_a_cancelled_wait_keeps_nothing() -> None:
    async def run() -> int:
        holder = await Placer.reserved("scorer", Resources(cpus=3), 1)
        waiting = asyncio.create_task(Placer.reserved("judge", Resources(cpus=3, start_timeout_s=60.0), 1))
        turns = 0
        while turns < 20:  # signals, control and other fleets have the loop to themselves meanwhile
            await asyncio.sleep(0.01)
            turns += not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        holder.close()
        return turns

    assert asyncio.run(run()) == 20  # ends only once the waiting thread has


JOINING_DRIVER = """
import os, sys
import ray
from cluster.placement import Placer, connect, disconnect
from cluster.topology import Resources
from rlhf.runs.memory import run_processes
from tests.cluster.test_placement import Worker

connect(sys.argv[1], num_cpus=None, object_store_bytes=None)
placer = Placer("judge", Resources(cpus=0.5), 1)
placer.reserve()
actor = ray.get(placer.spawn(Worker, {}).about.remote(), timeout=60)["pid"]
task = ray.remote(num_cpus=0.5)(lambda: os.getpid())  # not placed by us, as the ranks of Ray Train are not
rank = ray.get(task.remote(), timeout=60)
found = run_processes(os.getpid(), os.environ["RLHF_RUN_MARKER"])
assert {actor, rank} <= found, (actor, rank, found)
assert os.getppid() not in found, "the process that started the cluster is not of this run"
placer.close()
disconnect()
"""


@pytest.mark.usefixtures("cluster")
def test_workers_of_a_cluster_that_was_joined_carry_the_mark_of_the_run() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = os.environ | {"RLHF_RUN_MARKER": "joining-test"}
    command = [sys.executable, "-c", JOINING_DRIVER, address]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_leaves_no_child_behind() -> None:
    import ray

    placer = placed("generation", Resources(cpus=0.5), 1)
    worker = placer.spawn(Worker, {})
    pid = ray.get(worker.about.remote(), timeout=30)["pid"]
    child = ray.get(worker.spawn_child.remote(), timeout=30)
    assert Path(f"/proc/{child}").exists()
    os.kill(pid, signal.SIGKILL)
    try:
        wait_for(lambda: not Path(f"/proc/{child}").exists() or _is_zombie(child))
    finally:
        placer.close()
        if Path(f"/proc/{child}").exists() and not _is_zombie(child):
            os.kill(child, signal.SIGKILL)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_private_cluster_ends_with_its_driver() -> None:
    """Connects, places and leaves in a process of its own; nothing with its mark is left."""
    script = textwrap.dedent(
        """
        import ray
        from cluster.placement import Placer, cluster_nodes, connect, disconnect
        from cluster.topology import Resources
        from tests.cluster.test_placement import Worker

        connect(None, num_cpus=2, object_store_bytes=100 * 2**20)
        (node,) = cluster_nodes()
        assert (node.cpus, node.gpus) == (2.0, 0.0), node
        placer = Placer("judge", Resources(cpus=0.5), 1)
        placer.reserve()
        worker = placer.spawn(Worker, {})
        ray.get(worker.spawn_child.remote())
        disconnect()
        """
    )
    environment = os.environ | {"RLHF_RUN_MARKER": "placement-test"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wait_for(lambda: not _marked("placement-test"))


def _marked(mark: str) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("RLHF_RUN_MARKER") == mark:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


KILLED_DRIVER = """
import os, time
from cluster.placement import connect
connect(None, num_cpus=1, object_store_bytes=100 * 2**20)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_killed_driver_takes_its_private_cluster_along_in_seconds() -> None:
    """Ray's own agents too: by themselves they would try for a minute to reach the control store that died."""
    import psutil

    # First in the environment, where a new name of Ray's processes would cover it.
    environment = {CLUSTER_MARK: "", **{name: value for name, value in os.environ.items() if name != CLUSTER_MARK}}
    command = [sys.executable, "-c", KILLED_DRIVER]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "ready\n"
        started = psutil.Process(driver.pid).children(recursive=True)
        assert started
    finally:
        driver.kill()
        driver.wait(10)
    _, left = psutil.wait_procs(started, timeout=40)
    assert [process.name() for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
