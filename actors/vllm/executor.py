"""vLLM executors whose processes end with their owner.

This module is imported in each engine process while its arguments are unpickled, before vLLM waits for anything there:
importing it arms the watch (it does nothing in the owner itself).

The single-device executor runs the worker inside the engine process. On CPU that saves a process and its start over
vLLM's own choice; the thread variables that vLLM would give the worker are given to the engine process instead.
"""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from actors.vllm.watchdog import arm_from_environment

arm_from_environment()


class WatchedUniProcExecutor(UniProcExecutor):
    """One device: the worker lives in the engine process."""


class WatchedMultiprocExecutor(MultiprocExecutor):
    """Several devices: one process each. Workers also end when the engine process closes its pipe to them."""
