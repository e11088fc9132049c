"""Stands for Ray's metrics: keeps what is recorded, and is as strict about labels as they are."""

from __future__ import annotations

from collections.abc import Mapping

from actors.telemetry import Metric


class Recorded:
    """What was recorded: the value of each series, by metric name and labels."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.num_records = 0

    def make(self, metric: Metric) -> RecordedMetric:
        """The instrument of one metric."""
        return RecordedMetric(self, metric)

    def value(self, name: str, **labels: str) -> float:
        """The value of one series."""
        return self.series[name, frozenset(labels.items())]

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of all series of a metric."""
        return [dict(labels) for metric, labels in self.series if metric == name]


class RecordedMetric:
    """One instrument."""

    def __init__(self, recorded: Recorded, metric: Metric) -> None:
        self._recorded = recorded
        self._metric = metric

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        assert self._metric.kind == "gauge"
        self._keep(value, tags)

    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        assert self._metric.kind == "counter" and value > 0
        before = self._recorded.series.get((self._metric.name, frozenset(tags.items())), 0.0)
        self._keep(before + value, tags)

    def _keep(self, value: float, tags: Mapping[str, str]) -> None:
        assert set(tags) == {"run", *self._metric.labels}, "Ray refuses missing labels"
        assert all(isinstance(text, str) for text in tags.values())
        self._recorded.series[self._metric.name, frozenset(tags.items())] = value
        self._recorded.num_records += 1
