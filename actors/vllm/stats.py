"""What a vLLM engine says of itself, for Prometheus; imported where an engine starts.

vLLM has a logger that exports all of its metrics through Ray. It records some fifty at every step of the engine and
knows neither run nor role, so these few are kept here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.v1.metrics.loggers import StatLoggerBase

from actors.telemetry import ENGINE_METRICS, Instruments

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

_REPEAT_S = 5.0
"""A value that stays is told again after this time: Ray forgets a gauge that is silent for twenty seconds."""


class EngineGauges(StatLoggerBase):
    """Sets the gauges of one engine when they change.

    An engine steps many times a second and only while it has requests. Its last step leaves them at none.

    Args:
        vllm_config: Not used; vLLM passes it.
        engine_index: Not used; an actor has one engine.
        role: Value of the ``role`` label.
        instruments: Where the gauges are.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        vllm_config: VllmConfig | None,
        engine_index: int = 0,
        *,
        role: str,
        instruments: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._role = role
        self._instruments = instruments
        self._clock = clock
        self._told: tuple[int, int, float] | None = None
        self._told_at = 0.0

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Takes what vLLM knows after a step."""
        if scheduler_stats is None:
            return
        running, waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
        now = (running, waiting, round(scheduler_stats.kv_cache_usage, 2))
        if now == self._told and self._clock() - self._told_at < _REPEAT_S:
            return
        self._told, self._told_at = now, self._clock()
        self._instruments.set("rlhf_engine_requests", running, role=self._role, state="running")
        self._instruments.set("rlhf_engine_requests", waiting, role=self._role, state="waiting")
        self._instruments.set("rlhf_engine_kv_cache_ratio", scheduler_stats.kv_cache_usage, role=self._role)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def stat_loggers(role: str) -> list[Callable[..., StatLoggerBase]] | None:
    """What ``AsyncLLM`` takes as ``stat_loggers``; None where nobody would collect it, so that vLLM counts nothing."""
    instruments = Instruments.of_worker(ENGINE_METRICS)
    if instruments is None:
        return None
    return [functools.partial(EngineGauges, role=role, instruments=instruments)]
