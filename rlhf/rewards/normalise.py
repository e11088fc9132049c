"""Running mean and standard deviation of a reward, to bring sources of different size onto one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


class RunningMoments:
    """Mean and variance of all values seen so far, in one pass (Welford, 1962; merged as in Chan et al., 1979).

    The state is part of a checkpoint: without it, a resumed run would scale its rewards anew.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0

    @property
    def count(self) -> int:
        """Values seen."""
        return self._count

    @property
    def mean(self) -> float:
        """Mean of the values seen; 0 before the first."""
        return self._mean

    @property
    def std(self) -> float:
        """Standard deviation (n in the denominator); 1 before the second value and where all values are equal."""
        variance = self._squares / self._count if self._count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def update(self, values: Iterable[float | None]) -> None:
        """Takes in finite values; None is missing and passed over."""
        for value in values:
            if value is None:
                continue
            if not math.isfinite(value):
                raise ValueError(f"a reward of {value}")
            self._count += 1
            step = value - self._mean
            self._mean += step / self._count
            self._squares += step * (value - self._mean)

    def normalise(self, value: float) -> float:
        """Returns (value - mean) / std."""
        return (value - self._mean) / self.std

    def state(self) -> dict[str, float]:
        """Returns plain values for a checkpoint."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes over what ``state`` returned."""
        self._count, self._mean = int(state["count"]), float(state["mean"])
        self._squares = float(state["squares"])
