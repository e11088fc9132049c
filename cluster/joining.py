"""Joining a cluster: the connection, the arithmetic, the lease, and the wait for room."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from cluster.config import RunConfig, Stage
from cluster.lease import Lease, run_id
from cluster.placement import cluster_nodes, connect, disconnect, free_resources
from cluster.planning import check_free, check_placement
from cluster.storage import check_shared
from rlhf.errors import ClusterError, ConfigError, PlacementError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.memory import RUN_MARK

SETTLE_S = 20.0
"""How long a cluster that is joined may take to get back what earlier runs held there."""


@contextlib.asynccontextmanager
async def joined_cluster(config: RunConfig, stages: Sequence[Stage], run: RunDirectory) -> AsyncIterator[Lease | None]:
    """Connects for the length of a block, once the cluster has room for every stage; nothing of the run is left behind.

    Yields:
        The lease on what the run holds of a cluster that others use too, and what an earlier driver left there.

    Raises:
        ClusterError: There is no cluster; as below.
        ConfigError: Not all nodes of the cluster share the run directory; as below.
        PlacementError: A stage does not fit; nothing was placed, and the directory of a new run is withdrawn.
    """
    try:
        try:
            lease = await _join(config, stages, run)
        except (ClusterError, ConfigError, PlacementError):
            run.withdraw()  # what was refused can be mended and tried again in the same directory
            raise
        try:
            yield lease
        finally:
            if lease is not None:
                await asyncio.to_thread(lease.close)
    finally:
        disconnect()


async def _join(config: RunConfig, stages: Sequence[Stage], run: RunDirectory) -> Lease | None:
    if config.ray.address is not None:
        os.environ.setdefault(RUN_MARK, run_id(run))  # what outlives this driver is known to the next one by it
    object_store = config.ray.object_store_gib
    connect(
        config.ray.address,
        num_cpus=config.ray.num_cpus,
        object_store_bytes=None if object_store is None else int(object_store * 2**30),
    )
    check_placement(config, stages, cluster_nodes())
    if config.ray.address is None:
        return None
    lease = await asyncio.to_thread(Lease.take, run, config.ray.orphan_timeout_s)
    is_usable = False
    try:
        await wait_for_room(config, stages, lease=lease)
        await asyncio.to_thread(check_shared, config.directory.resolve())
        is_usable = True
    finally:
        if lease is not None and not is_usable:
            await asyncio.to_thread(lease.close)
    if lease is not None and lease.num_inherited:
        run.events.record("driver_reattached", num_actors=lease.num_inherited, silent_s=round(lease.silent_s, 3))
    return lease


async def wait_for_room(
    config: RunConfig, stages: Sequence[Stage], timeout_s: float = SETTLE_S, *, lease: Lease | None = None
) -> None:
    """Returns once a cluster that others use too has enough left for every stage.

    It does not queue behind them: the time is for what a run that has just ended gives back. What this run itself holds
    there counts as free.

    Raises:
        PlacementError: It has not, after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            free = await asyncio.to_thread(free_resources)
            if lease is not None:
                own = await asyncio.to_thread(lease.held)
                free = replace(free, cpus=free.cpus + own.cpus, gpus=free.gpus + own.gpus)
            check_free(config, stages, free)
            return
        except PlacementError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(min(1.0, timeout_s / 10))
