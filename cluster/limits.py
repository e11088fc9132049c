"""Deadlines, restarts and probes of a role's actors, from its section of the recipe."""

from __future__ import annotations

from actors.prober import ProbeLimits
from actors.replicas import FleetLimits
from cluster.topology import Resources


def fleet_limits(resources: Resources) -> FleetLimits:
    """How long to wait for the role's actors, and how often they are replaced."""
    return FleetLimits(
        resources.start_timeout_s, resources.call_timeout_s, resources.max_restarts, resources.restart_window_s
    )


def probe_limits(resources: Resources) -> ProbeLimits:
    """When the role's actors are probed."""
    return ProbeLimits(resources.probe_every_s, resources.probe_timeout_s, resources.stall_timeout_s)
