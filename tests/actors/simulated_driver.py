"""One life of the driver of an online run, over simulated roles: what it assembles is the real thing.

It follows ``cluster.stages.online`` step by step: fleets start, a gang resumes from the newest checkpoint, its weights
are published, the loop runs, and a lost gang starts again beside the living fleets.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.calls import await_ref, kill
from actors.fleet import Fleet, FleetLimits
from actors.gang import LearnerGang
from actors.publisher import BucketPublisher
from actors.remote_recorder import RemoteRecorder
from actors.restarts import ProgressBudget
from actors.roles import FleetGenerator, FleetScorer, StageRecorder
from rlhf.data.prompts import PromptCursor
from rlhf.errors import LearnerError, RlhfError
from rlhf.loops.gate import BudgetGate, GatedSource
from rlhf.loops.online import Hooks, LoopConfig, OnlineRoles, train_online
from rlhf.rewards.config import RewardModelPart
from rlhf.rewards.mixture import Mixture
from rlhf.types import Prompt
from tests.actors.local_ray import LocalActor
from tests.actors.simulated_roles import UPDATE_TIMEOUT_S, Engine, Meeting, Rank, Scorer, World
from tests.fakes import make_prompts

SEED = 7
CALL_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Plan:
    """The recipe of a run."""

    steps: int = 6
    num_prompts: int = 5
    prompts_per_step: int = 3
    num_samples: int = 2
    max_staleness: int = 0
    checkpoint_every: int = 2
    evaluate_every: int = 0
    replicas: int = 2
    num_scorers: int = 1
    num_ranks: int = 2
    exclusive: bool = False
    max_restarts: int = 3

    def cursor(self) -> PromptCursor:
        """The prompts of the run, from the first."""
        return PromptCursor(make_prompts(self.num_prompts), seed=SEED)

    def loop(self) -> LoopConfig:
        """The loop's section."""
        return LoopConfig(
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            num_samples=self.num_samples,
            max_staleness=self.max_staleness,
            checkpoint_every=self.checkpoint_every,
            evaluate_every=self.evaluate_every,
            step_timeout_s=24 * 3600.0,
        )

    def world(self) -> World:
        """The machines on which the run begins."""
        expected = [prompt.uid for prompt in self.cursor().next_batch(self.steps * self.prompts_per_step)]
        return World(expected, self.prompts_per_step, self.max_staleness)


@dataclass(frozen=True)
class Saved:
    """A checkpoint."""

    step: int
    folder: str
    state: Mapping[str, Any]


class Driver:
    """``rlhf run``, from its start to its end.

    Args:
        world: Where it runs.
        plan: What it runs.
        checkpoints: Those of the run so far; it adds its own.
    """

    def __init__(self, world: World, plan: Plan, checkpoints: list[Saved]) -> None:
        self.world, self.plan, self.checkpoints = world, plan, checkpoints
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.stopping = False
        self.marks = [Counter(world.struck)]
        """What had been struck when the driver began and at the end of each step."""
        self.first_step: int | None = None
        """Where the loop began last; None until it has."""
        shares = dict.fromkeys(("generation", "scorer", "learner", "publish"), 1.0) if plan.exclusive else {}
        self.gate = BudgetGate(shares)
        limits = self._limits = FleetLimits(600.0, CALL_TIMEOUT_S, plan.max_restarts, 1e9)
        self.fleets = {
            "generation": Fleet("generation", self._spawn_engine, world.retire, self.event, limits),
            "scorer": Fleet("scorer", self._spawn_scorer, world.retire, self.event, limits),
        }
        self.spawned: Counter[str] = Counter()
        self.allowed = Counter({"generation": plan.replicas, "scorer": plan.num_scorers})
        """Replicas that were asked for so far, those that left again included."""
        self._requests: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self._is_fresh = True
        self._roles: OnlineRoles
        self._gang: LearnerGang
        self._first_rank: Rank

    def event(self, kind: str, **fields: Any) -> None:
        """Writes an event; nothing is dispatched again without a loss."""
        self.events.append((kind, fields))
        if kind == "redispatched":
            struck = Counter(self.world.struck) - self.marks[0]
            self.world.check(bool(struck[fields["role"]]), f"{fields['role']} work was dispatched again for no loss")

    def scale(self, role: str, num_replicas: int) -> None:
        """``rlhf scale``: one request after the other, beside the run."""
        self.allowed[role] += num_replicas
        self._requests.put_nowait((role, num_replicas))

    async def run(self) -> int:
        """Runs to the end or to a stop; returns the number of updates done."""
        actor = self.world.recorder()
        recorder = RemoteRecorder(actor, self.event, limits=self._limits)
        beside = [asyncio.create_task(self._control()), asyncio.create_task(recorder.watch())]
        try:
            await recorder.start()
            for role, size in {"generation": self.plan.replicas, "scorer": self.plan.num_scorers}.items():
                async with self.gate.hold(role):
                    await self.fleets[role].scale(size)
            budget = ProgressBudget(self.plan.max_restarts, lambda: max((c.step for c in self.checkpoints), default=-1))
            while True:
                try:
                    return await self._life(recorder)
                except LearnerError as error:
                    self.event("gang_lost", error=str(error))
                    if not budget.take():
                        raise
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            for fleet in self.fleets.values():
                await fleet.stop()
            self._end([actor])

    def _spawn_engine(self, index: int) -> LocalActor:
        self.spawned["generation"] += 1
        return self.world.actor("generation", Engine(self.world))

    def _spawn_scorer(self, index: int) -> LocalActor:
        self.spawned["scorer"] += 1
        return self.world.actor("scorer", Scorer(self.world), serial=True)

    def _end(self, actors: Sequence[LocalActor]) -> None:
        for actor in actors:
            kill(actor)
            self.world.retire(actor)

    async def _control(self) -> None:
        while True:
            role, num_replicas = await self._requests.get()
            try:
                await self.fleets[role].scale(num_replicas)
            except RlhfError as error:
                self.event("scaling_failed", role=role, error=str(error))

    async def _life(self, recorder: RemoteRecorder) -> int:
        """One life of the learners; see ``cluster.stages.online``."""
        fleet, version = self.fleets["generation"], self.world.first_version
        self.world.life += 1
        await self._serve_policy(fleet)
        meeting = Meeting(self.plan.num_ranks)
        ranks = [Rank(self.world, rank, meeting) for rank in range(self.plan.num_ranks)]
        self._first_rank = ranks[0]
        actors = [self.world.actor("learner", rank, serial=True) for rank in ranks]
        self._gang = LearnerGang("learner", actors, timeout_s=CALL_TIMEOUT_S)
        try:
            async with self.gate.hold("learner"):
                await self._gang.start()
            publisher = BucketPublisher(
                self._gang, fleet, self.event, version=version, bucket_bytes=1000, timeout_s=UPDATE_TIMEOUT_S / 3
            )
            try:
                return await self._steps(publisher, StageRecorder(recorder, "rl"))
            finally:
                fleet.welcome = None
        finally:
            self._gang.kill()
            self._end(actors)

    async def _serve_policy(self, fleet: Fleet) -> None:
        """Newcomers and, behind an earlier life, all replicas load the policy's folder; see ``cluster.fleets``."""
        load = (Path("policy"), self.world.first_version, 1000)

        async def welcome(handle: Any) -> None:
            await await_ref(handle.load_folder.remote(*load), timeout_s=CALL_TIMEOUT_S, where="generation.load_folder")

        if not self._is_fresh:
            async with self.gate.hold("publish"):
                await fleet.change_weights(welcome, "load_folder", *load)
        fleet.welcome = welcome
        self._is_fresh = False

    async def _steps(self, publisher: BucketPublisher, recorder: StageRecorder) -> int:
        cursor, version = self.plan.cursor(), self.world.first_version
        scorer = FleetScorer("reward_model", self.fleets["scorer"], lambda *_: None)
        part = RewardModelPart(source="reward_model", normalise=True)
        rewards = Mixture([GatedSource(scorer, self.gate, "scorer")], [part])
        first_step = 0
        if self.checkpoints:
            saved = self.checkpoints[-1]
            first_step = saved.step
            cursor.restore(saved.state["cursor"])
            rewards.restore(saved.state["rewards"])
            async with self.gate.hold("learner"):
                await self._gang.load(saved.folder)
        async with self.gate.hold("publish"):
            await publisher.publish(version + first_step)
        self.first_step = first_step
        self._roles = OnlineRoles(
            prompts=cursor,
            generator=FleetGenerator(self.fleets["generation"], lambda *_: None),
            rewards=rewards,
            annotators={},
            learners={"learner": self._gang},
            publisher=publisher,
            recorder=recorder,
            gate=self.gate,
        )
        hooks = Hooks(self._log, self._evaluate, self._checkpoint, lambda: self.stopping, self.event)
        return await train_online(self._roles, self.plan.loop(), hooks, first_step=first_step, first_version=version)

    async def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.marks.append(Counter(self.world.struck))
        fleet = self.fleets["generation"]
        missing = 0 if self.plan.max_staleness else fleet.num_missing  # with nothing else at work: of the publication
        self.world.check(not (missing and fleet._restarts.left), f"nobody replaces {missing} behind a publication")

    async def _evaluate(self, num_updates: int) -> None:
        prompts = [Prompt(f"v{num_updates}/{prompt.uid}", (), (1,)) for prompt in make_prompts(3)]
        version = self.world.first_version + num_updates
        async with self.gate.hold("generation"):
            groups = await self._roles.generator.generate(prompts, num_samples=1, version=version, exact=True)
        for group in groups:
            drawn = self.world.store.values.get(group.payload)
            right = drawn is None or drawn.oldest == drawn.newest == self._first_rank.weights
            self.world.check(right, f"validation {num_updates} was drawn from other weights")

    async def _checkpoint(self, num_updates: int, state: Mapping[str, Any]) -> None:
        folder = f"step_{num_updates}.{self.world.number()}"
        async with self.gate.hold("learner"):
            await self._gang.save(folder)
        saved = Saved(num_updates, folder, json.loads(json.dumps(state)))
        self.check_saved(saved)
        self.checkpoints.append(saved)

    def check_saved(self, saved: Saved) -> None:
        """A checkpoint's ranks agree, and it goes on with the first prompt that its weights have not seen."""
        world, size = self.world, self.plan.prompts_per_step
        kept = world.saved[saved.folder]
        world.check(set(kept) == set(range(self.plan.num_ranks)), "a checkpoint without some rank")
        world.check({len(weights) for weights in kept.values()} == {saved.step}, "a checkpoint of mixed steps")
        cursor = self.plan.cursor()
        cursor.restore(saved.state["cursor"])
        due = world.expected[saved.step * size :]
        found = [prompt.uid for prompt in cursor.next_batch(len(due))] if due else []
        world.check(found == list(due), f"checkpoint {saved.step} goes on with {found[:1]} and not {list(due)[:1]}")
        scored = saved.state["rewards"]["reward_model"]["count"]
        least = saved.step * size * self.plan.num_samples
        right = scored >= least if world.lost else scored == least  # what is drawn again is scored again
        world.check(right, f"checkpoint {saved.step} has counted {scored} scores of {least}")
