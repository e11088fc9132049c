"""Ends an engine process when the process that owns it is gone, however that one died.

vLLM's engine process waits on a socket and would wait for ever if its owner were killed. A thread that waits on a
pidfd of the owner costs nothing and, unlike a parent-death signal, does not depend on which thread made the process.
"""

from __future__ import annotations

import os
import select
import signal
import threading

OWNER_VARIABLE = "RLHF_ENGINE_OWNER"
"""Environment variable that carries the owner's process id to the engine's processes."""

_armed: set[int] = set()


def arm_from_environment() -> bool:
    """Watches the owner named in the environment; returns whether this process is now watching one."""
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    if not owner or owner == os.getpid():
        return False
    if owner not in _armed:
        _armed.add(owner)
        arm(owner)
    return True


def arm(owner: int) -> None:
    """Kills this process as soon as process ``owner`` has ended, also where it ended before this call."""
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        _end()
        return
    thread = threading.Thread(target=_wait, args=(descriptor,), name="rlhf-owner-watch", daemon=True)
    thread.start()


def _wait(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)  # readable once the process has ended
    poller.poll()
    _end()


def _end() -> None:
    # Nothing here is worth saving, and an orderly exit could wait for a peer that is gone too.
    os.kill(os.getpid(), signal.SIGKILL)
