"""Metrics by name, what a fleet shows to those outside, and an engine's own gauges; nothing here starts Ray."""

from __future__ import annotations

import pytest

from actors.fleet import Fleet
from actors.fleet_status import note_version, snapshot
from actors.replicas import Replica, ReplicaState
from actors.telemetry import ENGINE_METRICS, RUN_LABEL, Instruments, Metric
from tests.recorded import Recorded

GAUGE = Metric("a", "gauge", "A.", ("role",))
COUNTER = Metric("b", "counter", "B.", ("role",))


def make_fleet(role: str = "generation") -> Fleet:
    return Fleet(role, lambda index: None, lambda handle: None, lambda kind, **fields: None)


def test_metrics_carry_the_run_and_their_own_labels() -> None:
    recorded = Recorded()
    instruments = Instruments((GAUGE, COUNTER), "r1", make=recorded.make)
    instruments.set("a", 3, role="judge")
    instruments.set("a", 2, role="judge")
    instruments.add("b", 1.5, role="judge")
    instruments.add("b", 2, role="judge")
    instruments.add("b", 0, role="judge")
    assert recorded.value("a", run="r1", role="judge") == 2
    assert recorded.value("b", run="r1", role="judge") == 3.5
    assert (GAUGE.exported, COUNTER.exported) == ("ray_a", "ray_b_total")


def test_a_counter_that_stands_still_is_not_told() -> None:
    recorded = Recorded()
    Instruments((COUNTER,), "r1", make=recorded.make).add("b", 0, role="judge")
    assert recorded.series == {}


def test_outside_of_a_run_there_is_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_LABEL, raising=False)
    assert Instruments.of_worker(ENGINE_METRICS) is None


def test_a_snapshot_counts_replicas_by_state_and_their_calls() -> None:
    fleet = make_fleet()
    fleet._wanted = 3
    fleet._replicas += [
        Replica(0, state=ReplicaState.HEALTHY, in_flight=2),
        Replica(1, state=ReplicaState.HEALTHY),
        Replica(2, state=ReplicaState.STARTING),
    ]
    fleet.backlog = 5
    note_version(fleet, 7)
    found = snapshot(fleet)
    assert (found.role, found.wanted, found.version) == ("generation", 3, 7)
    assert found.replicas == {"healthy": 2, "starting": 1}
    assert (found.calls, found.items) == (2, 5)
    assert snapshot(make_fleet()).version is None, "notes of one fleet are none of another's"


@pytest.mark.engine
def test_an_engine_tells_its_gauges_when_they_change_and_now_and_then() -> None:
    from vllm.v1.metrics.stats import SchedulerStats

    from actors.vllm.stats import EngineGauges

    recorded = Recorded()
    now = [0.0]
    instruments = Instruments(ENGINE_METRICS, "r1", make=recorded.make)
    gauges = EngineGauges(None, role="judge", instruments=instruments, clock=lambda: now[0])
    busy = SchedulerStats(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.25)
    for _ in range(100):
        gauges.record(busy, None)
    assert recorded.num_records == 3
    assert recorded.value("rlhf_engine_requests", run="r1", role="judge", state="waiting") == 2
    assert recorded.value("rlhf_engine_kv_cache_ratio", run="r1", role="judge") == 0.25
    now[0] = 60.0
    gauges.record(busy, None)
    assert recorded.num_records == 6, "Ray forgets a gauge that is silent"
    gauges.record(SchedulerStats(), None)
    gauges.record(None, None)
    assert recorded.value("rlhf_engine_requests", run="r1", role="judge", state="running") == 0
