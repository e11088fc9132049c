"""What the driver itself costs: its CPU time and the bytes that it receives and sends, per 1,000 rollouts.

The driver's own code runs as in a run: fleets, gang, mixture, online loop, rollouts and their handles. Around it stand
real Ray actors whose engines draw at once, so that nothing but the driver is measured. Each generation replica draws as
many rollouts a step, however many there are. A cost is flat where it grows neither with the completions' length (48 to
4,096 tokens) nor with the actors (2 to 64, half of them draw and half score). CPU time is that of all threads of this
process, Ray's included; bytes are those of its TCP connections, as the kernel counts them. The last line is JSON; a
ratio is the smallest case's cost over the largest one's: 1 is flat, less has grown.

    .venv/bin/python benchmarks/driver_overhead.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import statistics
import struct
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from actors.fleet import Fleet, FleetLimits
from actors.gang import LearnerGang
from actors.generation import GenerationWorker
from actors.publisher import BucketPublisher
from actors.remote_recorder import RemoteRecorder
from actors.roles import FleetGenerator, FleetScorer, StageRecorder
from actors.store import RayStore, Store, fetch_all, fetch_payload
from cluster.placement import connect, disconnect
from rlhf.data.prompts import PromptCursor
from rlhf.loops.gate import BudgetGate, GatedSource
from rlhf.loops.online import Hooks, LoopConfig, OnlineRoles, train_online
from rlhf.rewards.config import RewardModelPart
from rlhf.rewards.mixture import Mixture
from rlhf.sampling import SamplingConfig
from rlhf.types import Completion, GroupHandle, Handle, Prompt, Score, VersionSpan
from rlhf.weights import Bucket

LENGTHS = (48, 512, 4096)
ACTORS = (2, 8, 64)
LENGTHS_AT, ACTORS_AT = 8, 512
"""Actors of the cases that differ in length, and tokens of those that differ in actors."""
PROMPTS_PER_ENGINE, SIBLINGS, PROMPT_TOKENS = 8, 8, 64
RANKS, BUCKETS, BUCKET_BYTES = 2, 4, 2**20
WARM_UP, BLOCKS, BLOCK_ROLLOUTS = 2, 3, 1000
TARGET = 0.8
STORE_BYTES = 800 * 2**20


class StubWeights:
    """Takes every update."""

    async def begin(self, version: int) -> None:
        """Nothing to freeze."""

    async def load(self, bucket: Bucket) -> None:
        """Nothing to load."""

    async def finish(self, version: int, digest: str) -> None:
        """Nothing to check."""


class StubEngine:
    """Draws completions of the length that the prompt's uid names, at once."""

    def __init__(self) -> None:
        self.weights = StubWeights()

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to end."""

    async def sample(
        self, requests: Sequence[Any], sampling: SamplingConfig, *, version: int, exact: bool = False
    ) -> AsyncIterator[Completion]:
        """See ``VllmEngine.sample``."""
        for request in requests:
            num_tokens = int(request.name.split("/")[1])
            tokens, log_probs = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.float32)
            yield Completion(tokens, log_probs, "a" * num_tokens, "length", (VersionSpan(version, 0, num_tokens),))


class StubGenerationWorker(GenerationWorker):
    """A generation replica without vLLM."""

    def __init__(self, store: Store) -> None:
        self._engine = StubEngine()  # type: ignore[assignment]
        self._sampling = SamplingConfig(max_tokens=max(LENGTHS))
        self._max_model_len = PROMPT_TOKENS + max(LENGTHS)
        self._run_seed, self._dtype, self._store, self._name = 0, "float32", store, "generation"


class StubScorer:
    """Reads the groups, and scores without a model."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def start(self) -> None:
        """Nothing to load."""

    def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """See ``ScorerWorker.score``."""
        found = fetch_all(groups, self._store, fetch_payload, where="scorer")
        return [tuple(Score(0.5, {"reward_model_raw": 0.5}) for _ in group.rollouts) for group in found]

    def stop(self) -> None:
        """Nothing to give back."""


class StubRecorder:
    """Owns what is put and reads what it is told to write."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def keep(self, value: Any) -> list[Handle]:
        """See ``RecorderWorker.keep``."""
        return [self._store.put(value)]

    def record(self, stage: str, step: int, groups: Sequence[GroupHandle]) -> int:
        """See ``RecorderWorker.record``."""
        return len(fetch_all(groups, self._store, fetch_payload, where="recorder"))


class StubRank:
    """A learner rank that reads its groups, annotates them with arrays of their length, and publishes zeros."""

    def __init__(self, rank: int, store: Store) -> None:
        self._rank, self._store = rank, store

    def start(self) -> None:
        """Nothing to load."""

    def annotate(self, groups: Sequence[GroupHandle]) -> list[GroupHandle]:
        """See ``LearnerWorker.annotate``."""
        from dataclasses import replace

        def arrays(group: GroupHandle) -> tuple[Any, ...]:
            return tuple(np.zeros(length, np.float32) for length in group.completion_lengths)

        return [replace(group, annotations={"old_log_probs": self._store.put(arrays(group))}) for group in groups]

    def update(self, groups: Sequence[GroupHandle]) -> dict[str, float]:
        """See ``LearnerWorker.update``."""
        fetch_all(groups, self._store, fetch_payload, where="learner")
        return {"loss": 0.5, "gradient_norm": 1.0}

    def export_plan(self, bucket_bytes: int) -> list[list[str]]:
        """See ``LearnerWorker.export_plan``."""
        return [["weight"]] * BUCKETS

    def put_bucket(self, index: int) -> tuple[Any, str, int] | None:
        """See ``LearnerWorker.put_bucket``."""
        if self._rank:
            return None
        data = np.zeros(BUCKET_BYTES, np.uint8)
        bucket = Bucket(index, BUCKETS, ("weight",), ((BUCKET_BYTES // 4,),), "float32", data, "0" * 64)
        return self._store.put(bucket), bucket.digest, BUCKET_BYTES

    def stop(self) -> None:
        """Nothing to leave."""


class Traffic:
    """Bytes of this process's TCP connections, sent and received, closed ones as they were when last looked at."""

    _ACKED, _SIZE = 120, 256  # offset of tcpi_bytes_acked in struct tcp_info; tcpi_bytes_received is behind it

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}

    def totals(self) -> tuple[int, int]:
        """Sent and received so far."""
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError, struct.error):  # closed meanwhile, or not connected
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    self._look(int(name), status.st_ino)
        return sum(sent for sent, _ in self._seen.values()), sum(received for _, received in self._seen.values())

    def _look(self, descriptor: int, inode: int) -> None:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, self._SIZE)
                self._seen[inode] = struct.unpack_from("QQ", information, self._ACKED)


@dataclass(frozen=True)
class Mark:
    """Where the driver stood at the end of a step."""

    cpu_s: float
    wall_s: float
    sent: int
    received: int


@dataclass(frozen=True)
class Cost:
    """Of 1,000 rollouts."""

    cpu_s: float
    sent: float
    received: float
    wall_s: float


class Bench:
    """Fleets, gang and recorder of one cluster, and the loop over them."""

    def __init__(self) -> None:
        recorder = ray.remote(StubRecorder).options(num_cpus=0, max_concurrency=4).remote(RayStore())
        self.recorder = RemoteRecorder(recorder)
        store, limits = RayStore(recorder), FleetLimits()
        self.generation = Fleet("generation", _spawner(StubGenerationWorker, store), _forget, _event, limits)
        self.scorer = Fleet("scorer", _spawner(StubScorer, store), _forget, _event, limits)
        ranks = [ray.remote(StubRank).options(num_cpus=0).remote(rank, RayStore()) for rank in range(RANKS)]
        self.gang = LearnerGang("learner", ranks)
        self.publisher = BucketPublisher(
            self.gang, self.generation, _event, version=0, bucket_bytes=BUCKET_BYTES, timeout_s=600.0
        )
        self.traffic = Traffic()

    async def scale(self, num_actors: int) -> float:
        """Brings half of the actors to draw and half to score; returns the seconds that it took."""
        began = time.monotonic()
        for fleet in (self.generation, self.scorer):
            await fleet.scale(num_actors // 2)
        return time.monotonic() - began

    async def measure(self, num_tokens: int) -> list[Cost]:
        """Runs the loop and returns each block's cost."""
        num_prompts = PROMPTS_PER_ENGINE * len(self.generation.healthy)
        steps_per_block = -(-BLOCK_ROLLOUTS // (num_prompts * SIBLINGS))
        config = LoopConfig(
            steps=WARM_UP + BLOCKS * steps_per_block,
            prompts_per_step=num_prompts,
            num_samples=SIBLINGS,
            checkpoint_every=10**6,
        )
        marks: list[Mark] = []

        async def log(step: int, metrics: Mapping[str, float]) -> None:
            marks.append(Mark(time.process_time(), time.monotonic(), *self.traffic.totals()))

        await self.publisher.publish(0)
        await train_online(self._roles(num_tokens, num_prompts), config, _hooks(log))
        ends = marks[WARM_UP - 1 :: steps_per_block]
        scale = 1000 / (steps_per_block * num_prompts * SIBLINGS)
        return [
            Cost(
                scale * (b.cpu_s - a.cpu_s),
                scale * (b.sent - a.sent),
                scale * (b.received - a.received),
                scale * (b.wall_s - a.wall_s),
            )
            for a, b in zip(ends, ends[1:], strict=False)
        ]

    def _roles(self, num_tokens: int, num_prompts: int) -> OnlineRoles:
        prompts = [Prompt(f"{num_tokens:04d}/{i}", (), (1,) * PROMPT_TOKENS) for i in range(num_prompts)]
        gate = BudgetGate({})
        scorer = FleetScorer("reward_model", self.scorer, _no_meter)
        part = RewardModelPart(source="reward_model", normalise=True)
        return OnlineRoles(
            prompts=PromptCursor(prompts, seed=0),
            generator=FleetGenerator(self.generation, _no_meter),
            rewards=Mixture([GatedSource(scorer, gate, "scorer")], [part]),
            annotators={"learner": self.gang},
            learners={"learner": self.gang},
            publisher=self.publisher,
            recorder=StageRecorder(self.recorder, "rl"),
            gate=gate,
        )

    async def close(self) -> None:
        """Ends all actors."""
        for fleet in (self.generation, self.scorer):
            await fleet.stop()
        self.gang.kill()


def _spawner(worker: type, store: RayStore) -> Any:
    actor = ray.remote(worker).options(num_cpus=0, max_restarts=0, max_task_retries=0)
    return lambda index: actor.remote(store)


def _forget(handle: Any) -> None:
    """No placement to give back."""


def _event(kind: str, **fields: Any) -> None:
    if kind not in ("replica_joined", "replica_left"):
        raise RuntimeError(f"the driver is not measured alone: {kind} {fields}")


def _no_meter(role: str, tokens: int, seconds: float) -> None:
    """Nobody asks for throughput here."""


def _hooks(log: Any) -> Hooks:
    async def nothing(*_: Any) -> None:
        """Neither validation nor checkpoints; the driver has no part in their cost."""

    return Hooks(log, nothing, nothing, lambda: False, _event)


def _show(num_actors: int, num_tokens: int, costs: Sequence[Cost]) -> Cost:
    cost = Cost(*(statistics.median(getattr(c, name) for c in costs) for name in Cost.__annotations__))
    print(
        f"{num_actors:>6} {num_tokens:>6} {1000 * cost.cpu_s:>8.0f} {cost.received / 1024:>12.0f}"
        f" {cost.sent / 1024:>8.0f} {1000 / cost.wall_s:>10.0f}",
        flush=True,
    )
    return cost


async def run() -> tuple[dict[str, float], Cost, Cost]:
    """Measures all cases and returns the ratios, and the costs with the fewest actors and with the most."""
    bench = Bench()
    found: dict[tuple[int, int], Cost] = {}
    print("actors tokens   CPU ms  received KiB sent KiB rollouts/s   (per 1,000 rollouts, medians)", flush=True)
    for num_actors in ACTORS:
        seconds = await bench.scale(num_actors)
        print(f"# {num_actors} actors after {seconds:.0f} s", flush=True)
        for num_tokens in LENGTHS if num_actors == LENGTHS_AT else (ACTORS_AT,):
            found[num_actors, num_tokens] = _show(num_actors, num_tokens, await bench.measure(num_tokens))
    await bench.close()
    shortest, longest = (found[LENGTHS_AT, num_tokens] for num_tokens in (min(LENGTHS), max(LENGTHS)))
    fewest, most = (found[num_actors, ACTORS_AT] for num_actors in (min(ACTORS), max(ACTORS)))
    ratios = {
        "cpu_length": shortest.cpu_s / longest.cpu_s,
        "bytes_length": (shortest.sent + shortest.received) / (longest.sent + longest.received),
        "cpu_actors": fewest.cpu_s / most.cpu_s,
        "bytes_actors": (fewest.sent + fewest.received) / (most.sent + most.received),
    }
    return ratios, fewest, most


def main() -> None:
    """Starts a private cluster, measures, and prints table and ratios."""
    began = time.monotonic()
    connect(None, num_cpus=4, object_store_bytes=STORE_BYTES)
    try:
        ratios, fewest, most = asyncio.run(run())
    finally:
        disconnect()
    result = {
        "name": "driver_overhead",
        "ratio": {
            "median": statistics.median(ratios.values()),
            "min": min(ratios.values()),
            "max": max(ratios.values()),
        },
        "target": TARGET,
        "limit": None,
        "own_seconds": most.cpu_s,
        "peer_seconds": fewest.cpu_s,
        "tokens_sampled": 1000 * ACTORS_AT,  # of the 1,000 rollouts that the seconds are for; stubs draw them
        "tokens_trained": 0,  # the learners are stubs
        "ratios": ratios,
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
