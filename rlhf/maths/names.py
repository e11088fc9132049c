"""The choices that formulas offer, by name; imports no torch."""

from __future__ import annotations

from typing import Literal

KlEstimator = Literal["k1", "k2", "k3"]
"""Estimators of a KL from samples, by their names in Schulman (2020)."""

Aggregation = Literal["token_mean", "sequence_mean", "group_mean", "fixed_length"]
"""How per-token losses become one number; see ``rlhf.maths.aggregate``."""
