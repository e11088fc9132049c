"""Rows by slice, and the slice that does worst."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from rlhf.evaluation.bootstrap import Interval

RowT = TypeVar("RowT")


def by_slice(rows: Iterable[RowT], key: Callable[[RowT], str]) -> dict[str, list[RowT]]:
    """Groups rows by ``key``; slices come in the order of their names."""
    slices: dict[str, list[RowT]] = {}
    for row in rows:
        slices.setdefault(key(row), []).append(row)
    return dict(sorted(slices.items()))


def worst_slice(intervals: Mapping[str, Interval], *, higher_is_better: bool = True) -> str:
    """Name of the slice with the worst mean; the first by name where several are equally bad."""
    if not intervals:
        raise ValueError("no slices")
    sign = 1.0 if higher_is_better else -1.0
    return min(sorted(intervals), key=lambda name: sign * intervals[name].mean)
