"""Metrics for Prometheus, through Ray's own metrics.

Whatever a process of a run records with ``ray.util.metrics`` goes to the agent of its node, and every node's agent
serves it to Prometheus. That works alike for the driver and for workers, on a cluster that a run starts for itself (its
agents run without the dashboard, too) and on one that it joins, and it needs no port of ours. An endpoint of the driver
alone would know nothing of the engines, and could not be reached where the driver is a job on some node.

Ray puts ``ray_`` before a name and ``_total`` behind that of a counter, and adds labels of its own: ``NodeAddress``,
``SessionName``, ``WorkerId``. Agents get new values every ten seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

RUN_LABEL = "RLHF_RUN_LABEL"
"""Environment variable that tells workers the value of their metrics' ``run`` label: the run directory's name."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: As it is recorded; see ``exported``.
        kind: ``gauge`` for what goes up and down, ``counter`` for what adds up while a driver lives.
        help: What it is, with its unit.
        labels: Beside ``run``, which all have.
    """

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


ENGINE_METRICS = (
    Metric("rlhf_engine_requests", "gauge", "Requests in a vLLM engine, running or waiting", ("role", "state")),
    Metric("rlhf_engine_kv_cache_ratio", "gauge", "Share of a vLLM engine's KV cache that is in use", ("role",)),
)
"""Recorded by each vLLM engine's worker; ``WorkerId`` tells replicas of a role apart."""


def ray_instrument(metric: Metric) -> Any:
    """The object of Ray that records a metric."""
    from ray.util import metrics

    kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
    return kind(metric.name, description=metric.help, tag_keys=("run", *metric.labels))


class Instruments:
    """Records metrics by name, with the ``run`` label filled in.

    Args:
        declared: What may be recorded.
        run: Value of the ``run`` label.
        make: Makes what records one metric: ``set(value, tags=)`` of a gauge, ``inc(value, tags=)`` of a counter.
    """

    def __init__(self, declared: Iterable[Metric], run: str, *, make: Callable[[Metric], Any] = ray_instrument) -> None:
        self._run = run
        self._instruments = {metric.name: make(metric) for metric in declared}

    @classmethod
    def of_worker(cls, declared: Iterable[Metric]) -> Instruments | None:
        """The instruments of a worker of a run; None outside of one, where nobody would collect them."""
        import ray

        run = os.environ.get(RUN_LABEL)
        return cls(declared, run) if run and ray.is_initialized() else None

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Gives a gauge its value."""
        self._instruments[name].set(float(value), tags=self._tags(labels))

    def add(self, name: str, value: float, /, **labels: str) -> None:
        """Adds to a counter; 0 is not told, as a counter without its first event is not there yet."""
        if value > 0:
            self._instruments[name].inc(float(value), tags=self._tags(labels))

    def _tags(self, labels: Mapping[str, str]) -> dict[str, str]:
        return {"run": self._run, **labels}
