"""Ray in one event loop: actors whose calls are tasks, references, streams and an object store that loses things.

What ``actors`` asks of a handle works as with Ray, order and failures included: calls overlap in an actor of
coroutines, come one after the other in a serial one, go on when their caller has left, and fail with Ray's own errors
when the actor dies.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from rlhf.errors import ValueLostError


class LocalRef:
    """A reference to one value that may be pending."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future

    def settle(self, value: Any) -> None:
        if self._future.done():
            return
        if isinstance(value, Exception):
            self._future.set_exception(value)
        else:
            self._future.set_result(value)


class LocalStream:
    """References that come one by one."""

    def __init__(self) -> None:
        self._refs: asyncio.Queue[LocalRef | None] = asyncio.Queue()

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> LocalRef:
        ref = await self._refs.get()
        if ref is None:
            raise StopAsyncIteration
        return ref

    def deliver(self, value: Any) -> None:
        ref = LocalRef()
        ref.settle(value)
        self._refs.put_nowait(ref)

    def settle(self, value: Any) -> None:
        """Ends the stream, with an error where ``value`` is one."""
        if isinstance(value, Exception):
            self.deliver(value)
        self._refs.put_nowait(None)


class LocalActor:
    """A worker and what a handle to it can do.

    Args:
        worker: A plain object; its coroutines are the methods.
        role: Name in errors.
        serial: Whether calls wait for each other, as in an actor of plain methods.
    """

    def __init__(self, worker: Any, role: str, *, serial: bool = False) -> None:
        self.worker, self.role = worker, role
        self.alive = True
        self._turn = asyncio.Lock() if serial else None
        self._calls: dict[asyncio.Task[None], LocalRef | LocalStream] = {}

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_") and name != "__ray_ready__":
            raise AttributeError(name)
        return _Method(self, name)

    def die(self) -> None:
        """SIGKILL: what is in flight fails, and so does all that is asked later."""
        self.alive = False
        calls, self._calls = self._calls, {}
        for task, reply in calls.items():
            if task is not asyncio.current_task():
                task.cancel()
            reply.settle(self._failure())

    def end(self) -> None:
        """What ``ray.kill`` does."""
        self.die()

    def _failure(self) -> Exception:
        return ActorDiedError()

    def submit(self, method: str, reply: LocalRef | LocalStream, args: tuple[Any, ...]) -> Any:
        if not self.alive:
            reply.settle(self._failure())
            return reply
        task = asyncio.get_event_loop().create_task(self._run(method, reply, args))
        self._calls[task] = reply
        task.add_done_callback(lambda done: self._calls.pop(done, None))
        return reply

    async def _run(self, method: str, reply: LocalRef | LocalStream, args: tuple[Any, ...]) -> None:
        try:
            if self._turn is not None:
                async with self._turn:
                    result = await self._work(method, reply, args)
            else:
                result = await self._work(method, reply, args)
        except Exception as error:  # what Ray makes of whatever a worker raises
            text = traceback.format_exc()
            result = RayTaskError(method, text, error, proctitle=self.role, pid=1, ip="127.0.0.1")
        if self.alive:
            reply.settle(result)

    async def _work(self, method: str, reply: LocalRef | LocalStream, args: tuple[Any, ...]) -> Any:
        found = getattr(self.worker, method)(*args)
        if not inspect.isasyncgen(found):
            return await found
        assert isinstance(reply, LocalStream)
        async for value in found:
            if self.alive:
                reply.deliver(value)
        return None


class RestartingActor(LocalActor):
    """An actor that is started again some time after each death, with a new worker, until it is ended.

    Args:
        make: Makes a worker of this actor.
        role: Name in errors.
        restart_s: Seconds from a death to the next life.
        on_death: Called with each death.
    """

    def __init__(
        self,
        make: Callable[[LocalActor], Any],
        role: str,
        *,
        restart_s: float = 5.0,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(None, role)
        self._make, self._restart_s, self._on_death = make, restart_s, on_death
        self._restart: asyncio.TimerHandle | None = None
        self.ended = False
        self.worker = make(self)

    def die(self) -> None:
        if self.alive:
            super().die()
            self._on_death()
            self._restart = asyncio.get_event_loop().call_later(self._restart_s, self.come_back)

    def end(self) -> None:
        self.ended = True
        self.die()
        if self._restart is not None:
            self._restart.cancel()

    def come_back(self) -> None:
        """Begins the next life now."""
        if not self.ended and not self.alive:
            assert self._restart is not None, "set by its death"
            self._restart.cancel()
            self.worker, self.alive = self._make(self), True

    def _failure(self) -> Exception:
        return ActorDiedError() if self.ended else ActorUnavailableError("The actor is restarting.", b"0" * 16)


@dataclass
class _Method:
    """What ``handle.method`` gives: ``remote`` and ``options(...).remote``."""

    actor: LocalActor
    name: str
    reply: Callable[[], LocalRef | LocalStream] = LocalRef

    def options(self, *, num_returns: str = "", concurrency_group: str = "") -> _Method:
        assert num_returns == "streaming" or concurrency_group
        return _Method(self.actor, self.name, LocalStream if num_returns else LocalRef)

    def remote(self, *args: Any) -> Any:
        return self.actor.submit(self.name, self.reply(), args)


@dataclass(frozen=True)
class Stored:
    """Handle of a value in a ``LosingStore``."""

    number: int


class LosingStore:
    """An object store whose values go away with their node."""

    def __init__(self) -> None:
        self.values: dict[Stored, Any] = {}
        self._next = 0

    def put(self, value: Any) -> Stored:
        handle = Stored(self._next)
        self._next += 1
        self.values[handle] = value
        return handle

    def get(self, handle: Stored) -> Any:
        if handle not in self.values:
            raise ValueLostError(str(handle), found="no copy", needed="one", action="Look for a lost node.")
        return self.values[handle]
