"""One engine for all tests of a session: starts cost half a minute, publishing weights costs milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from actors.generation import GenerationWorker
from actors.store import LocalStore
from actors.vllm.config import EngineConfig
from actors.vllm.engine import VllmEngine
from actors.vllm.processes import Cores
from rlhf.sampling import SamplingConfig
from rlhf.types import GroupHandle, Message, Prompt
from rlhf.weights import Bucket, combine_digests, make_bucket, plan_buckets

ENGINE = EngineConfig(
    dtype="float32",
    max_model_len=256,
    max_num_seqs=16,
    max_num_batched_tokens=256,  # a step's prompts do not fit into one pass
    kv_cache_gib=0.1,
    update_timeout_s=60.0,
    enable_sleep=True,  # on a CPU nothing is freed, but vLLM keeps account of what is asleep
)
SAMPLING = SamplingConfig(max_tokens=24)


def make_worker(model: Path, *, version: int = 0) -> GenerationWorker:
    return GenerationWorker(
        model, ENGINE, SAMPLING, run_seed=11, store=LocalStore(), cores=Cores(threads=2), version=version
    )


def make_prompts(num_prompts: int = 4) -> list[Prompt]:
    return [
        Prompt(f"test/{i}", (Message("user", "x"),), tuple(range(5 + i, 45 + 2 * i)), {"row": str(i)})
        for i in range(num_prompts)
    ]


async def draw(
    worker: GenerationWorker, prompts: Sequence[Prompt], num_samples: int, version: int, *, exact: bool = False
) -> list[GroupHandle]:
    return [group async for group in worker.stream(prompts, num_samples, version, exact)]


def engine_of(worker: GenerationWorker) -> VllmEngine:
    return worker._engine


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def make_buckets(tensors: Mapping[str, torch.Tensor], bucket_bytes: int = 100_000) -> list[Bucket]:
    plan = plan_buckets({name: t.numel() * t.element_size() for name, t in tensors.items()}, bucket_bytes)
    return [make_bucket(i, len(plan), {name: tensors[name] for name in names}) for i, names in enumerate(plan)]


def texts_and_bits(groups: Sequence[GroupHandle]) -> list[tuple[str, bytes, bytes]]:
    return [
        (group.uid, rollout.completion.token_ids.tobytes(), rollout.completion.log_probs.tobytes())
        for group in groups
        for rollout in group.payload.rollouts
    ]


class RunningWorker:
    """A started worker and the event loop that it lives in; versions only ever grow."""

    def __init__(self, model: Path, worker: GenerationWorker | None = None) -> None:
        self.model = model
        self.worker = worker or make_worker(model)
        self.version = 0
        self._runner = asyncio.Runner()
        self.run(self.worker.start())

    def run(self, call: Awaitable[Any]) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(call, 240)

        return self._runner.run(bounded())

    @property
    def engine(self) -> VllmEngine:
        return engine_of(self.worker)

    def publish(self, buckets: Sequence[Bucket]) -> int:
        async def send() -> None:
            await self.worker.begin_update(version)
            for bucket in buckets:
                await self.worker.receive_bucket([bucket])
            await self.worker.finish_update(version, combine_digests([bucket.digest for bucket in buckets]))

        self.version += 1
        version = self.version
        self.run(send())
        return version

    def reset(self) -> int:
        """Publishes the weights of the model folder, whatever an earlier test left behind."""
        return self.publish(make_buckets(weights_of(self.model)))

    def generate(self, *, version: int | None = None, num_samples: int = 4) -> list[GroupHandle]:
        wanted = self.version if version is None else version
        return self.run(draw(self.worker, make_prompts(), num_samples, wanted))

    def stop(self) -> None:
        self.run(self.worker.stop())
        self._runner.close()
