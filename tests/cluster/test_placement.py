"""Placement on real Ray: places are reused and given back, and no child of a killed worker is left."""

from __future__ import annotations

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


def free_cpus() -> float:
    import ray

    return ray.available_resources().get("CPU", 0.0)


def wait_for(condition, seconds: float = 15.0) -> None:
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

    placer = Placer("judge", Resources(cpus=0.5, threads=3), 2)
    assert free_cpus() == 3.0, "reserved before anything runs"
    first, second = (placer.spawn(Worker, index, {}, {"EXTRA": "x"}) for index in range(2))
    about = ray.get([first.about.remote(), second.about.remote()], timeout=30)
    assert {a["group"] for a in about} == {about[0]["group"]}
    assert about[0]["cpus"] == 0.5
    assert about[0]["env"] == {"OMP_NUM_THREADS": "3", "RLHF_RUN_MARKER": os.environ["RLHF_RUN_MARKER"], "EXTRA": "x"}

    ray.kill(first)
    placer.retire(first)
    placer.retire(first)  # once more does no harm
    third = placer.spawn(Worker, 2, {})
    assert ray.get(third.about.remote(), timeout=30)["group"] == about[0]["group"]
    assert free_cpus() == 3.0

    joined = placer.spawn(Worker, 3, {})
    assert ray.get(joined.about.remote(), timeout=30)["group"] != about[0]["group"]
    assert free_cpus() == 2.5
    ray.kill(joined)
    placer.retire(joined)
    wait_for(lambda: free_cpus() == 3.0)

    placer.close()
    wait_for(lambda: free_cpus() == 4.0)
    wait_for(lambda: not any(Path(f"/proc/{a['pid']}").exists() for a in about))


@pytest.mark.usefixtures("cluster")
def test_what_does_not_fit_says_so_within_its_bound_and_keeps_nothing() -> None:
    began = time.monotonic()
    with pytest.raises(PlacementError, match="role scorer") as caught:
        Placer("scorer", Resources(cpus=3, start_timeout_s=1.0), 2)
    assert time.monotonic() - began < 5
    assert caught.value.exit_code == 3

    placer = Placer("scorer", Resources(cpus=3, start_timeout_s=1.0), 1)
    placer.spawn(Worker, 0, {})
    with pytest.raises(PlacementError):
        placer.spawn(Worker, 1, {})
    placer.close()


@pytest.mark.usefixtures("cluster")
def test_closing_ends_a_wait_for_room() -> None:
    import threading

    placer = Placer("scorer", Resources(cpus=3, start_timeout_s=60.0), 1)
    placer.spawn(Worker, 0, {})
    errors: list[Exception] = []

    def join() -> None:
        try:
            placer.spawn(Worker, 1, {})
        except PlacementError as error:
            errors.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    time.sleep(0.5)
    placer.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_leaves_no_child_behind() -> None:
    import ray

    placer = Placer("generation", Resources(cpus=0.5), 1)
    worker = placer.spawn(Worker, 0, {})
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
        from cluster.placement import Placer, connect, disconnect, free_nodes
        from cluster.topology import Resources
        from tests.cluster.test_placement import Worker

        connect(None, num_cpus=2, object_store_bytes=100 * 2**20)
        (node,) = free_nodes()
        assert (node.cpus, node.gpus) == (2.0, 0.0), node
        placer = Placer("judge", Resources(cpus=0.5), 1)
        worker = placer.spawn(Worker, 0, {})
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
