"""One vLLM engine: start, drawing completions, label log-probabilities, stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.health import Observed, Probe
from actors.parts import ENGINE_PARTS
from actors.vllm.config import EngineConfig
from actors.vllm.link import EngineLink
from actors.vllm.processes import Cores, descendants, end_processes, engine_environment, restored_environment
from actors.vllm.update import WeightUpdates
from rlhf.errors import ConfigError
from rlhf.sampling import SamplingConfig
from rlhf.types import Completion, VersionSpan

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for the engine.

    Attributes:
        name: For errors and logs; need not be unique.
        prompt_ids: The prompt. [P]
        seed: Seed of this completion alone; label log-probabilities need none.
    """

    name: str
    prompt_ids: tuple[int, ...]
    seed: int = 0


class VllmEngine:
    """Owns a vLLM ``AsyncLLM`` and its processes.

    Not thread-safe: all coroutines run in one event loop. Construction is light; ``start`` loads the model. New weights
    come in through ``weights``.

    Args:
        model: Folder in Hugging Face layout, weights as safetensors.
        config: How to start it.
        cores: Which CPU cores, or how many threads, its processes may use.
        version: Version number of the weights in the folder.
        name: For errors, for example ``"generation[0]"``.
        role: Whose engine it is, in metrics.
    """

    def __init__(
        self,
        model: Path,
        config: EngineConfig,
        *,
        cores: Cores | None = None,
        version: int = 0,
        name: str = "engine",
        role: str = "engine",
    ) -> None:
        self._model = Path(model)
        self._config = config
        self._cores = cores or Cores()
        self._start_version = version
        self._link = EngineLink(name)
        self._role = role
        self.weights = WeightUpdates(self._link, config.update_timeout_s)
        self._pids: list[int] = []
        self._in_flight: dict[str, RequestOutputCollector] = {}
        self._counter = 0
        self._num_delivered = 0
        self._num_drawn = 0

    @property
    def version(self) -> int | None:
        """Version of the weights that are served; None while nothing may be served."""
        return self._link.version

    @property
    def is_alive(self) -> bool:
        """Whether the engine's process runs."""
        return self._link.is_alive

    @property
    def processes(self) -> tuple[int, ...]:
        """Ids of the engine's processes; they are gone after ``stop``."""
        return tuple(self._pids)

    @property
    def num_in_flight(self) -> int:
        """Requests that were admitted and have not finished."""
        return len(self._in_flight)

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Loads the model and waits until the engine is ready; a second call returns at once.

        Raises:
            ConfigError: The folder or the settings cannot be used here.
            EngineError: The engine process failed.
            DeadlineError: It was not ready after ``start_timeout_s``.
        """
        if self._link.llm is not None:
            return
        if not (self._model / "config.json").is_file():
            raise ConfigError(
                f"{self._link.name}: model",
                found=f"no config.json in {self._model}",
                needed="a model folder in Hugging Face layout",
                action="Check the path.",
            )
        before = descendants()
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                llm = await asyncio.to_thread(self._build)
        except TimeoutError:
            await end_processes(descendants() - before, _STOP_TIMEOUT_S)
            raise self._link.deadline("start", self._config.start_timeout_s) from None
        except (RuntimeError, ValueError, OSError) as error:  # what vLLM raises for a process or settings that failed
            await end_processes(descendants() - before, _STOP_TIMEOUT_S)
            raise self._link.failed(f"an engine that could not start ({error})") from error
        self._pids = sorted(descendants() - before)
        self._link.llm = llm
        await self._link.call(llm.update_weight_version(str(self._start_version)), "start")
        self._link.version = self._start_version

    def _build(self) -> AsyncLLM:
        with restored_environment(engine_environment(self._cores, self._config.start_timeout_s)):
            from vllm.v1.engine.async_llm import AsyncLLM

            from actors.vllm.arguments import engine_arguments
            from actors.vllm.stats import stat_loggers

            arguments = engine_arguments(self._model, self._config, self._link.name)
            return AsyncLLM.from_engine_args(arguments, stat_loggers=stat_loggers(self._role))

    async def stop(self) -> None:
        """Ends the engine's processes, whatever state they are in; may be called twice."""
        self._link.refuse("it was stopped")
        self.weights.cancel()
        llm, self._link.llm = self._link.llm, None
        if llm is not None:
            with contextlib.suppress(TimeoutError):  # the processes are ended below, without asking
                await asyncio.wait_for(asyncio.to_thread(llm.shutdown, 5.0), _STOP_TIMEOUT_S)
        await end_processes(self._pids, _STOP_TIMEOUT_S)

    async def probe(self, worker: Observed) -> Probe:
        """How the engine's work goes: tokens are progress, and its process answers between two of its steps.

        Raises:
            EngineError: Its process died.
        """
        llm = self._link.alive()
        states = llm.output_processor.request_states.values()
        unfinished = sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)
        if (num_drawn := self._num_delivered + unfinished) != self._num_drawn:
            # It sinks for a while when a completion is finished whose turn to be delivered has not come.
            worker.progress(max(1, num_drawn - self._num_drawn))
            self._num_drawn = num_drawn
        await self._link.call(llm.is_sleeping(), "probe")
        return dataclasses.replace(worker.health(), unfinished_tokens=unfinished, version=self.version)

    async def abandon(self, why: str, *, serve: bool) -> None:
        """Gives up everything that is under way or waits: an open update, requests, and who stands in line with some.

        For an engine whose driver is gone, before another one uses it.

        Args:
            why: For errors.
            serve: Whether the weights may be served on; an update that was open leaves none to serve.
        """
        link = self._link
        link.num_abandoned += 1
        await self.weights.abort(why)
        async with link.admission:
            if not serve:
                link.refuse(why)
            await link.call(link.alive().pause_generation(mode="abort", clear_cache=True), "abort")
            await link.call(link.alive().resume_generation(), "resume")

    # -- drawing ------------------------------------------------------------------------------------------------

    async def sample(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, version: int, exact: bool = False
    ) -> AsyncGenerator[Completion, None]:
        """Draws one completion per request and yields them in the order of the requests.

        All requests are admitted before the first of them runs, in their order: with nothing else in flight, the same
        requests and weights give the same bits.

        Args:
            requests: What to draw, in order of admission.
            sampling: The distribution.
            version: Oldest weights that will do.
            exact: Whether later weights will not do.

        Raises:
            EngineError: The engine died, or does not serve the weights that were asked for.
            DeadlineError: Not done after ``generate_timeout_s``.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=sampling.max_tokens,
                min_tokens=sampling.min_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                ignore_eos=sampling.ignore_eos,
                seed=request.seed,
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for request in requests
        ]
        async with contextlib.aclosing(self._run(requests, parameters, version, exact)) as outputs:
            async for output in outputs:
                yield self._completion(output)

    async def label_log_probs(self, requests: Sequence[Request], label_ids: Sequence[int]) -> list[tuple[float, ...]]:
        """Scores single-token continuations of each prompt.

        Args:
            requests: The prompts. [N]
            label_ids: The tokens to score.

        Returns:
            Per prompt, the log-probability of each label over the whole vocabulary, in nats.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprob_token_ids=list(label_ids),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for _ in requests
        ]
        rows = []
        async with contextlib.aclosing(self._run(requests, parameters, 0, exact=False)) as outputs:
            async for output in outputs:
                found = output.outputs[0].logprobs
                if not found:
                    raise self._link.failed(f"no log-probabilities for {output.request_id}")
                rows.append(tuple(found[0][token].logprob for token in label_ids))
        return rows

    async def _run(
        self, requests: Sequence[Request], parameters: Sequence[SamplingParams], version: int, exact: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._config.generate_timeout_s
        admitted: dict[str, RequestOutputCollector] = {}
        num_abandoned = self._link.num_abandoned
        try:
            while True:
                await self._link.call(self._link.settled.wait(), "generate", ends - loop.time())
                async with self._link.admission:
                    if self._link.num_abandoned != num_abandoned:
                        raise self._link.failed("that the driver who asked for this is gone")
                    if self._link.settled.is_set():
                        self._link.check_serving(version, exact=exact)
                        await self._admit(requests, parameters, admitted)
                        break
            for key, queue in admitted.items():
                yield await self._finished(key, queue, ends - loop.time())
        finally:
            await self._forget(admitted)

    async def _admit(
        self,
        requests: Sequence[Request],
        parameters: Sequence[SamplingParams],
        admitted: dict[str, RequestOutputCollector],
    ) -> None:
        from vllm.inputs.engine import tokens_input

        # What an earlier batch left in the prefix cache would change how this one is computed, and so its last bits.
        async with self._link.paused(clear_cache=not self._in_flight) as llm:
            for request, params in zip(requests, parameters, strict=True):
                self._counter += 1
                key = f"{self._counter}:{request.name}"
                prompt = tokens_input(list(request.prompt_ids))
                queue = await self._link.call(llm.add_request(key, prompt, params), "submit")
                admitted[key] = self._in_flight[key] = queue

    async def _finished(self, key: str, queue: RequestOutputCollector, timeout_s: float) -> RequestOutput:
        output: Any = await self._link.call(queue.get(), "generate", max(timeout_s, 0.001))
        self._in_flight.pop(key, None)
        self._num_delivered += len(output.outputs[0].token_ids)
        if output.outputs[0].finish_reason not in ("stop", "length"):
            raise self._link.failed(f"that it gave {key} up ({output.outputs[0].finish_reason})")
        return output

    async def _forget(self, admitted: dict[str, RequestOutputCollector]) -> None:
        """Aborts what is still running of a batch whose caller left."""
        left = [key for key in admitted if self._in_flight.pop(key, None) is not None]
        if left and self._link.llm is not None and self._link.is_alive:
            # In the engine a request is known by an id of vLLM's own, which the queue carries.
            await self._link.call(
                self._link.llm.abort([admitted[key].request_id for key in left], internal=True), "abort"
            )

    def _completion(self, output: RequestOutput) -> Completion:
        from vllm.logprobs import FlatLogprobs

        found = output.outputs[0]
        token_ids = np.asarray(found.token_ids, dtype=np.int32)
        values = found.logprobs.logprobs if isinstance(found.logprobs, FlatLogprobs) else ()
        log_probs = np.asarray(values, dtype=np.float32)
        if log_probs.shape != token_ids.shape or not np.isfinite(log_probs).all():
            raise self._link.failed(f"{np.isfinite(log_probs).sum()} log-probs for {token_ids.size} tokens")
        spans = tuple(VersionSpan(int(span.version), span.start, span.end) for span in found.weight_versions or ())
        return Completion(token_ids, log_probs, found.text, str(found.finish_reason), spans)

    # -- memory -------------------------------------------------------------------------------------------------

    async def reside(self, parts: Collection[str]) -> None:
        """Keeps these of ``ENGINE_PARTS`` in GPU memory; does nothing unless ``enable_sleep`` is set.

        Weights that are put aside wait in host memory; the KV cache is dropped, and what is in flight stands still
        until it is there again and is then computed anew. Nothing is served while a part is aside. Weights can be
        brought back without the cache, so that an update finds them before the cache takes the rest of the memory.
        """
        if not self._config.enable_sleep:
            return
        link, aside = self._link, ENGINE_PARTS - set(parts)
        async with link.admission:
            llm = link.alive()
            if aside - link.asleep:  # vLLM lets go of everything at once
                link.asleep = ENGINE_PARTS
                await link.call(llm.sleep(level=1, mode="keep"), "sleep")
            woken = link.asleep - aside
            if woken:  # vLLM wakes nothing at all where one of the names is awake already
                await link.call(llm.wake_up(tags=sorted(woken)), "wake")
                link.asleep = aside
            if woken and not aside:
                await link.call(llm.resume_generation(), "resume")
