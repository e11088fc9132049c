"""A driver that is killed on a joined cluster: what it leaves, who takes it over, and that nothing stays for ever."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.runs.events import EventLog
from tests.conftest import SESSION_MARK
from tests.joined import ROOT, JoinedCluster, joined_cluster

pytestmark = pytest.mark.engine

LONG_S = 300.0
"""A lease that no test waits for the end of."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[JoinedCluster]:
    """Two nodes: one on demand, one spot."""
    kinds = ("on-demand", "spot")
    with joined_cluster(*({"num_cpus": 4, "labels": {"market": kind}} for kind in kinds)) as cluster:
        yield cluster


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory with what tells runs apart."""
    EventLog(tmp_path / "events.jsonl").record("created")
    return tmp_path


class Driver:
    """A driver in a process of its own, from the time when it has its actors."""

    def __init__(self, cluster: JoinedCluster, run: Path, timeout_s: float, **roles: dict[str, Any]) -> None:
        wanted = {"address": cluster.address, "run": str(run), "timeout_s": timeout_s, "roles": roles}
        command = [sys.executable, "-m", "tests.cluster.joined_driver", json.dumps(wanted)]
        environment = cluster.environment | {"GLOO_SOCKET_IFNAME": "lo"}
        self.errors = run / f"driver-{time.monotonic_ns()}.log"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.told: dict[str, Any] = {}
        self._hear()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        told = next((line for line in self.process.stdout if line.startswith("{")), None)
        assert told is not None, self.errors.read_text()[-2000:]
        self.told = json.loads(told)

    def work(self) -> None:
        """Lets it give its fleets work, and tell what they are then."""
        assert self.process.stdin is not None
        self.process.stdin.write("work\n")
        self.process.stdin.flush()
        self._hear()

    def pids(self, role: str) -> list[int]:
        """Of a role's actors, in their order."""
        return [about["pid"] for about in self.told["roles"][role]]

    def kinds(self) -> list[str]:
        """Of the events so far."""
        return [event["kind"] for event in self.told["events"]]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> int:
        """Ends in order, after a kill not at all."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait(90)


@pytest.fixture
def drive(cluster: JoinedCluster, run: Path) -> Iterator[Callable[..., Driver]]:
    """Starts drivers of one run; what they leave is ended at the end."""
    drivers: list[Driver] = []

    def start(timeout_s: float = LONG_S, **roles: dict[str, Any]) -> Driver:
        drivers.append(Driver(cluster, run, timeout_s, **roles))
        return drivers[-1]

    yield start
    for driver in drivers[:-1]:
        driver.kill()
    drivers[-1].end()  # with all that the run has left, its predecessors' included
    drivers[-1].kill()


def gone(pids: list[int]) -> bool:
    left = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            left += [pid] if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else []
    return not left


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)


def keepers() -> list[int]:
    """Processes of keepers that this session has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            title, mark = " ".join(process.cmdline()), process.environ().get(SESSION_MARK)
            if title.startswith("ray::Keeper") and mark == os.environ[SESSION_MARK]:
                found.append(process.pid)
    return found


def test_a_killed_drivers_actors_are_taken_over_where_they_fit_and_ended_where_not(
    drive: Callable[..., Driver],
) -> None:
    first = drive(
        judge={"count": 2},
        generation={"count": 1, "word": "hoarse"},
        scorer={"count": 1, "word": "old"},
        rules={"count": 1},
        learner={"count": 2, "gang": True},
        critic={"count": 2, "gang": True},
    )
    assert (first.told["inherited"], first.told["held"]) == (0, 0.0)
    first.kill()
    os.kill(first.pids("critic")[1], signal.SIGKILL)
    second = drive(
        judge={"count": 3},
        generation={"count": 1, "word": "hoarse"},
        scorer={"count": 1, "word": "new"},
        learner={"count": 2, "gang": True},
        critic={"count": 2, "gang": True},
    )
    assert second.told["inherited"] == 9 and second.told["held"] == pytest.approx(0.9)
    judges = {about["pid"]: about["told"] for about in second.told["roles"]["judge"]}
    assert len(judges) == 3 and judges.keys() > set(first.pids("judge")), "they live on, and what is missing is made"
    kept = ["start", "abandon", "hello", "start"]
    assert all(told == (kept if pid in first.pids("judge") else ["start"]) for pid, told in judges.items())
    assert second.pids("learner") == first.pids("learner"), "in the order of their ranks"
    assert second.told["events"].count({"kind": "orphans_ended", "roles": ["rules"]}) == 1
    assert [e["role"] for e in second.told["events"] if e["kind"] == "replica_refused"] == ["generation"]
    ended = [*first.pids("generation"), *first.pids("scorer"), *first.pids("rules"), *first.pids("critic")]
    wait_for(lambda: gone(ended))
    assert not set(second.pids("critic")) & set(first.pids("critic")), "a gang without one of its ranks is none"
    assert second.told["roles"]["scorer"][0]["word"] == "new"
    everything = [pid for role in second.told["roles"] for pid in second.pids(role)]
    assert second.end() == 0, second.errors.read_text()[-2000:]
    wait_for(lambda: gone(everything))  # a driver that ends in order leaves nothing
    wait_for(lambda: not keepers())


@pytest.mark.slow
def test_what_nobody_takes_over_is_ended_when_the_lease_runs_out(drive: Callable[..., Driver]) -> None:
    driver = drive(timeout_s=8.0, judge={"count": 2})
    [keeper] = keepers()
    time.sleep(9.0)
    assert not gone(driver.pids("judge")), "a driver that lives renews its lease"
    driver.kill()
    wait_for(lambda: gone([*driver.pids("judge"), keeper]))
    again = drive(timeout_s=8.0, judge={"count": 1})
    assert again.told["inherited"] == 0 and again.told["held"] == 0.0, "their placement is given back, too"


def test_a_driver_that_another_has_followed_ends_itself_and_nothing_else(drive: Callable[..., Driver]) -> None:
    slept = drive(judge={"count": 1})
    os.kill(slept.process.pid, signal.SIGSTOP)
    follower = drive(judge={"count": 1})
    assert set(follower.pids("judge")) == set(slept.pids("judge"))
    os.kill(slept.process.pid, signal.SIGCONT)
    assert slept.process.wait(60) == 3
    assert "ClusterError: the run's lease on the cluster" in slept.errors.read_text()
    assert not gone(follower.pids("judge"))
    assert follower.process.poll() is None
    assert follower.end() == 0


def test_without_a_timeout_nothing_outlives_the_driver(drive: Callable[..., Driver]) -> None:
    driver = drive(timeout_s=0.0, judge={"count": 1})
    assert not keepers()
    driver.kill()
    wait_for(lambda: gone(driver.pids("judge")))


def test_roles_are_placed_by_labels_and_ranks_node_by_node(
    drive: Callable[..., Driver], cluster: JoinedCluster
) -> None:
    spot, steady = ({"labels": {"market": kind}} for kind in ("spot", "!spot"))
    driver = drive(
        generation={"count": 1, "resources": spot},
        learner={"count": 1, "resources": steady, "gang": True},
        critic={"count": 3, "resources": {"strategy": "SPREAD"}, "gang": True},
    )
    roles = driver.told["roles"]
    assert {about["node"] for about in roles["generation"]} == {cluster.nodes[1]}
    assert {about["node"] for about in roles["learner"]} == {cluster.nodes[0]}
    nodes = [about["node"] for about in roles["critic"]]
    assert len(set(nodes)) == len([*itertools.groupby(nodes)]) == 2
    assert {about["interface"] for about in roles["critic"]} == {"lo"}, "the driver's choice of a network"


@pytest.mark.slow
def test_a_node_that_is_taken_away_without_grace_loses_a_replica_and_no_work(
    drive: Callable[..., Driver], cluster: JoinedCluster
) -> None:
    driver = drive(judge={"count": 2, "resources": {"strategy": "SPREAD"}})
    assert {about["node"] for about in driver.told["roles"]["judge"]} == set(cluster.nodes[:2])
    cluster.remove(1)
    cluster.add(num_cpus=4, labels={"market": "spot"})
    driver.work()  # which fails where work is lost
    assert [kind for kind in driver.kinds() if kind in ("replica_lost", "redispatched")]
    driver.work()
    judges = driver.told["roles"]["judge"]
    assert len(judges) == 2 and cluster.nodes[1] not in {about["node"] for about in judges}
    driver.kill()
    again = drive(judge={"count": 2, "resources": {"strategy": "SPREAD"}})
    assert set(again.pids("judge")) == set(driver.pids("judge")), "the newcomer was known to the keeper, too"


@pytest.mark.slow
def test_a_recorder_is_started_again_wherever_its_labels_allow_whoever_is_there(
    drive: Callable[..., Driver], cluster: JoinedCluster
) -> None:
    """Killed under its driver, killed when there is none, and lost with its node under the next one."""
    recorder = {"count": 1, "restarts": True, "resources": {"labels": {"market": "spot"}}}
    first = drive(recorder=recorder)
    pids = first.pids("recorder")
    os.kill(pids[-1], signal.SIGKILL)
    first.work()
    pids += first.pids("recorder")
    first.kill()
    os.kill(pids[-1], signal.SIGKILL)
    second = drive(recorder=recorder)
    assert (second.told["inherited"], second.kinds()) == (1, ["replica_adopted"]), "it is back by itself"
    pids += second.pids("recorder")
    assert second.told["roles"]["recorder"][0]["node"] == cluster.nodes[-1]
    cluster.remove(len(cluster.nodes) - 1)
    cluster.add(num_cpus=4, labels={"market": "spot"})
    second.work()
    assert second.told["roles"]["recorder"][0]["node"] == cluster.nodes[-1]
    pids += second.pids("recorder")
    assert len(set(pids)) == 4
    assert second.kinds()[1:] == ["replica_lost", "replica_joined"]
    assert second.end() == 0, second.errors.read_text()[-2000:]
    wait_for(lambda: gone(pids))
    wait_for(lambda: not keepers())
