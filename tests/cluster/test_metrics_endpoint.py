"""Metrics of driver and workers are there for Prometheus, on the private cluster that a run starts for itself."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request

import pytest
import ray

from actors.calls import await_ref
from actors.telemetry import ENGINE_METRICS, RUN_LABEL, Instruments
from cluster.placement import Placer
from cluster.telemetry import DRIVER_METRICS, cluster_view
from cluster.topology import Resources

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]

RUN = "an-observed-run"
WAIT_S = 120.0
"""Agents get new values every ten seconds."""


class EngineLike:
    """A worker that records what an engine's worker does."""

    def record(self) -> bool:
        self.instruments = Instruments.of_worker(ENGINE_METRICS)
        if self.instruments is None:
            return False
        self.instruments.set("rlhf_engine_requests", 7, role="generation", state="running")
        return True


def scraped(endpoint: str) -> list[str]:
    """The lines that Prometheus would get."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{endpoint}/metrics", timeout=30) as answer:
        return answer.read().decode().splitlines()


def line_of(lines: list[str], name: str, **labels: str) -> str | None:
    """The sample of a series, with its labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return next((line for line in lines if line.startswith(f"{name}{{") and all(one in line for one in wanted)), None)


def test_what_driver_and_workers_record_is_at_the_nodes_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_LABEL, RUN)
    placer = Placer("engine", Resources(cpus=0.1, threads=1, start_timeout_s=60.0), 1)
    placer.reserve()
    try:
        worker = placer.spawn(EngineLike, {})
        assert asyncio.run(await_ref(worker.record.remote(), timeout_s=60.0, where="record"))
        instruments = Instruments(DRIVER_METRICS, RUN)
        instruments.add("rlhf_steps", 3, stage="rl")
        view = cluster_view()
        [endpoint] = view.endpoints
        deadline = time.monotonic() + WAIT_S
        found: dict[str, str | None] = {}
        while not found or None in found.values():
            assert time.monotonic() < deadline, found
            instruments.set("rlhf_replicas", 2, role="generation", state="healthy")
            lines = scraped(endpoint)
            found = {
                "gauge": line_of(lines, "ray_rlhf_replicas", run=RUN, role="generation", state="healthy"),
                "counter": line_of(lines, "ray_rlhf_steps_total", run=RUN, stage="rl"),
                "worker's": line_of(lines, "ray_rlhf_engine_requests", run=RUN, role="generation", state="running"),
            }
            time.sleep(0.5)
    finally:
        placer.close()
    values = {name: float((line or "").rpartition(" ")[2]) for name, line in found.items()}
    assert values == {"gauge": 2.0, "counter": 3.0, "worker's": 7.0}


def test_the_object_store_is_told_as_it_fills() -> None:
    before = cluster_view()
    assert 0 <= before.object_store < before.capacity
    kept = ray.put(os.urandom(20 * 2**20))
    deadline = time.monotonic() + WAIT_S
    while cluster_view().object_store < before.object_store + 15 * 2**20:
        assert time.monotonic() < deadline, "Ray hears of it within seconds"
        time.sleep(0.2)
    del kept
