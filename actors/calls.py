"""Calls to remote workers: the one boundary where Ray's failures become ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

import ray
from ray import exceptions

from rlhf.errors import DeadlineError, ReplicaLostError, RlhfError, WorkerError

T = TypeVar("T")

_INFRASTRUCTURE = (exceptions.RayError, OSError, EOFError, MemoryError, RuntimeError, asyncio.CancelledError)
"""What machines, networks, devices and collectives make a worker raise: torch has little but ``RuntimeError`` for a
lost device or peer. Any other exception comes from the worker's own code and would be the same on every machine."""


def classify(error: Exception, where: str) -> RlhfError:
    """Turns what a Ray call raised into an error of ours; one that a task raised keeps its traceback in the text.

    A worker's own ``RlhfError`` comes back as it was raised. A dead actor, an unreachable node, a lost object or what
    else machines do to a worker is a ``ReplicaLostError``; a defect of the worker's code is a ``WorkerError``.
    """
    if isinstance(error, exceptions.RayTaskError):
        # Ray raises a mixture of its own class and the cause's; the cause alone is what the worker raised.
        if isinstance(error.cause, RlhfError):
            return error.cause
        if isinstance(error.cause, _INFRASTRUCTURE) and not isinstance(error.cause, RecursionError):
            return ReplicaLostError(
                where, found=str(error), needed="a result", action="See the worker's log for the cause."
            )
        return _defect(where, str(error))
    if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:  # a constructor asks no machine
        return _defect(where, str(error))
    return ReplicaLostError(
        where, found=f"{type(error).__name__}: {error}", needed="a living worker", action="It is replaced if it can be."
    )


def _defect(where: str, found: str) -> WorkerError:
    return WorkerError(
        where,
        found=found,
        needed="a result",
        action="This is a defect of the code, which no restart mends. Mend it and run the same command again.",
    )


async def await_ref(ref: Any, *, timeout_s: float, where: str) -> Any:
    """Waits for one Ray reference, at most ``timeout_s`` seconds.

    Raises:
        DeadlineError: Nothing came in time; the call may still be running.
        ReplicaLostError: The worker died, or its machine failed it.
        WorkerError: The worker's code has a defect.
        RlhfError: What the worker raised.
    """
    try:
        async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 can swallow the cancellation of its caller
            return await asyncio.wrap_future(ref.future())
    except exceptions.RayError as error:  # before TimeoutError: a worker may have raised one of those itself
        raise classify(error, where) from error
    except TimeoutError:
        raise _deadline(where, timeout_s) from None


async def stream(refs: Any, *, timeout_s: float, where: str) -> AsyncIterator[Any]:
    """Yields the values of a streaming call as they come; the whole of it ends within ``timeout_s`` seconds."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    iterator = aiter(refs)
    while True:
        left = deadline - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(left, 0.0)):
                ref = await anext(iterator)
        except StopAsyncIteration:
            return
        except exceptions.RayError as error:
            raise classify(error, where) from error
        except TimeoutError:
            raise _deadline(where, timeout_s) from None
        yield await await_ref(ref, timeout_s=max(left, 1.0), where=where)


async def gather_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Awaits everything and returns results in order; a failure ends the rest, is waited out, and then raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _deadline(where: str, timeout_s: float) -> DeadlineError:
    return DeadlineError(
        where,
        found=f"no answer after {timeout_s:.0f} s",
        needed="an answer",
        action="Look at the worker's log; raise the role's call_timeout_s if the work is this long.",
    )


def kill(handle: Any) -> None:
    """Ends an actor at once; one that is already gone is left alone."""
    ray.kill(handle, no_restart=True)


def restart(handle: Any) -> None:
    """Ends an actor's process at once; where the actor may be restarted, Ray starts another."""
    ray.kill(handle, no_restart=False)
