"""The generation role: prompts in, rollout groups in the object store, weights by publication."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from actors.health import Probe, ProbedLoop
from actors.store import Store
from actors.vllm.config import EngineConfig
from actors.vllm.engine import Request, VllmEngine
from actors.vllm.processes import Cores
from rlhf.errors import DataError, PublicationError, RlhfError
from rlhf.sampling import SamplingConfig, sampling_seed
from rlhf.types import Completion, GroupHandle, Handle, Prompt, Rollout, RolloutGroup
from rlhf.weights import Bucket, combine_digests


class GenerationWorker(ProbedLoop):
    """One replica of the generation fleet.

    Construction is light and ``start`` loads the model. All methods are coroutines of one event loop and may overlap.

    Args:
        model: Folder in Hugging Face layout.
        engine: How vLLM is started.
        sampling: The distribution that completions are drawn from.
        run_seed: Seed of the run.
        store: Where rollout groups go and buckets come from.
        cores: Which cores, or how many threads, the engine may use.
        version: Version number of the weights in the folder.
        name: For errors, for example ``"generation[0]"``.
    """

    def __init__(
        self,
        model: Path,
        engine: EngineConfig,
        sampling: SamplingConfig,
        run_seed: int,
        store: Store,
        *,
        cores: Cores | None = None,
        version: int = 0,
        name: str = "generation",
    ) -> None:
        self._engine = VllmEngine(model, engine, cores=cores, version=version, name=name, role="generation")
        self._dtype = engine.dtype
        self._max_model_len = engine.max_model_len
        self._sampling = sampling
        self._run_seed = run_seed
        self._store = store
        self._name = name

    async def start(self) -> None:
        """Loads the model; returns when the replica can draw."""
        await self._engine.start()

    async def stop(self) -> None:
        """Ends the engine and its processes."""
        await self._engine.stop()

    async def stream(
        self, prompts: Sequence[Prompt], num_samples: int, version: int, exact: bool = False
    ) -> AsyncGenerator[GroupHandle, None]:
        """Draws all siblings of all prompts at once and yields each group as it is complete, in the prompts' order.

        The prompts are admitted together before the first token is drawn. With nothing else in flight, a repeated call
        on the same weights gives the same tokens and log-probs, bit for bit.

        Args:
            prompts: What to answer.
            num_samples: Siblings per prompt.
            version: Oldest weights that will do; also part of each completion's seed.
            exact: Whether weights later than ``version`` will not do.

        Raises:
            DataError: A prompt leaves no room for a completion.
            EngineError: The engine died, or does not serve the weights that were asked for.
            DeadlineError: The engine did not finish in time.
        """
        self._check_lengths(prompts)
        with self.at_work():
            async with contextlib.aclosing(self._draw(prompts, num_samples, version, exact)) as groups:
                async for group in groups:
                    yield group

    async def _draw(
        self, prompts: Sequence[Prompt], num_samples: int, version: int, exact: bool
    ) -> AsyncGenerator[GroupHandle, None]:
        requests = [
            Request(f"{prompt.uid}#{k}", prompt.token_ids, sampling_seed(self._run_seed, prompt.uid, k, version))
            for prompt in prompts
            for k in range(num_samples)
        ]
        siblings: list[Completion] = []
        remaining = iter(prompts)
        async with contextlib.aclosing(
            self._engine.sample(requests, self._sampling, version=version, exact=exact)
        ) as completions:
            async for completion in completions:
                siblings.append(completion)
                if len(siblings) == num_samples:
                    yield await self._put(next(remaining), siblings)
                    siblings = []

    async def probe(self) -> Probe:
        """Asks the engine too, which answers between two of its steps.

        Raises:
            EngineError: Its process died.
        """
        return await self._engine.probe(self)

    async def begin_update(self, version: int) -> None:
        """Stops serving, freezes what is in flight and opens the replica for buckets of ``version``."""
        await self._engine.weights.begin(version)

    async def receive_bucket(self, handles: Sequence[Handle]) -> None:
        """Loads one bucket; buckets come in order of their index.

        Args:
            handles: The bucket's, in a list: Ray would fetch what a bare one stands for before it calls this method.

        Raises:
            ValueLostError: The bucket went away with its learner. The update stays open and nothing is served, so that
                what is in flight waits for an update that is begun anew.
            PublicationError: It is not the bucket that is due, or was altered; the update is over.
        """
        bucket = await asyncio.to_thread(self._store.get, *handles)
        if not isinstance(bucket, Bucket):
            await self._engine.weights.abort("its update brought something other than weights")
            raise PublicationError(
                self._name,
                found=f"a {type(bucket).__name__}",
                needed="a bucket of weights",
                action="Publish the weights again.",
            )
        await self._engine.weights.load(bucket)

    async def finish_update(self, version: int, digest: str) -> None:
        """Serves the new weights, if all of them arrived: ``digest`` is ``combine_digests`` of the buckets sent."""
        await self._engine.weights.finish(version, digest)

    async def load_folder(self, folder: Path, version: int, bucket_bytes: int) -> None:
        """Takes the weights of a saved model as if they had been published: how a fleet changes models between stages.

        Args:
            folder: Hugging Face layout, of the architecture that the engine was started with.
            version: Version number of these weights.
            bucket_bytes: Largest bucket held in memory.
        """
        from rlhf.models.buckets import folder_buckets

        await self.begin_update(version)
        digests: list[str] = []
        try:
            buckets = folder_buckets(folder, bucket_bytes, self._dtype)
            while (bucket := await asyncio.to_thread(next, buckets, None)) is not None:
                await self._engine.weights.load(bucket)
                digests.append(bucket.digest)
        except RlhfError:
            await self.abort_update()
            raise
        await self.finish_update(version, combine_digests(digests))

    async def abort_update(self) -> None:
        """Gives an open update up; the replica does not serve until another one succeeded."""
        await self._engine.weights.abort()

    async def abandon(self) -> None:
        """Gives up what a driver that is gone had asked for; nothing is served until an update has succeeded."""
        await self._engine.abandon("its driver is gone, and nobody has given it the current weights since", serve=False)

    async def tensor_digests(self) -> Mapping[str, str]:
        """BLAKE2b of each tensor that the last update handed to the engine, by Hugging Face name."""
        return await self._engine.weights.tensor_digests()

    async def reside(self, parts: Sequence[str]) -> None:
        """Keeps these parts (``weights``, ``kv_cache``) in GPU memory, where the engine section allows it to sleep."""
        await self._engine.reside(parts)

    def _check_lengths(self, prompts: Sequence[Prompt]) -> None:
        max_tokens = self._sampling.max_tokens
        for prompt in prompts:
            if not prompt.token_ids or len(prompt.token_ids) + max_tokens > self._max_model_len:
                raise DataError(
                    f"prompt {prompt.uid}",
                    found=f"{len(prompt.token_ids)} tokens and completions of up to {max_tokens}",
                    needed=f"at least one token, and at most {self._max_model_len} together",
                    action="Shorten the prompt or sampling.max_tokens, or raise max_model_len of the engine section.",
                )

    async def _put(self, prompt: Prompt, siblings: Sequence[Completion]) -> GroupHandle:
        spans = [span.version for completion in siblings for span in completion.version_spans]
        lengths = tuple(len(completion.token_ids) for completion in siblings)
        group = RolloutGroup(prompt, tuple(Rollout(completion) for completion in siblings))
        return GroupHandle(
            uid=prompt.uid,
            payload=await asyncio.to_thread(self._store.put, group),  # it may wait for the group's owner
            prompt_length=len(prompt.token_ids),
            completion_lengths=lengths,
            weight_versions=(min(spans), max(spans)),
        )
