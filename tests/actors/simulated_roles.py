"""The roles of an online run without engines: workers that know which weights really drew, scored and trained what.

Weights are the list of updates that made them, so that two weights of one version number but of different histories
are told apart. A worker writes down whatever should never happen in ``World.wrongs``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.store import fetch_all, fetch_payload
from rlhf.errors import EngineError, PublicationError, RecordError, RolloutsLostError
from rlhf.runs.places import FileEntry
from rlhf.types import GroupHandle, Prompt, Score
from rlhf.weights import combine_digests
from tests.actors.local_ray import LocalActor, LosingStore, RestartingActor, Stored

NUM_BUCKETS = 2
UPDATE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Update:
    """One update in the history of some weights; no two updates ever made are equal."""

    number: int
    uids: tuple[str, ...]


Weights = tuple[Update, ...]


@dataclass(frozen=True)
class Drawn:
    """What stands in the store for the siblings of one prompt: the weights that began and ended the drawing."""

    uid: str
    number: int
    oldest: Weights
    newest: Weights


@dataclass
class Fault:
    """What befalls the worker of ``role`` that comes to ``point`` when ``after`` others have."""

    role: str
    point: str
    kind: str
    after: int = 0


@dataclass
class World:
    """The machines and the disk of one run, and what its workers know of the truth.

    Attributes:
        expected: Uids in the order in which they have to be trained.
        prompts_per_step: Of the loop.
        max_staleness: Of the loop.
        first_version: Version of the policy before the first update.
        wrongs: What should never have happened.
        faults: Ordered, and not met yet.
        struck: Roles that faults have struck, in order.
        disk: Draws that the record holds, by step.
        saved: What ranks have saved, by folder.
    """

    expected: Sequence[str]
    prompts_per_step: int
    max_staleness: int
    first_version: int = 3
    wrongs: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    store: LosingStore = field(default_factory=LosingStore)
    disk: dict[int, tuple[int, ...]] = field(default_factory=dict)
    saved: dict[str, dict[int, Weights]] = field(default_factory=dict)
    actors: list[LocalActor] = field(default_factory=list)
    places: Counter[LocalActor] = field(default_factory=Counter)
    """1 for an actor that has a place, 0 once it was given back."""
    lost: set[str] = field(default_factory=set)
    """Uids of groups that went away with their node or with the recorder."""
    owner: RestartingActor | None = None
    """The recorder."""
    life: int = 0
    """Counts the lives of the learners."""
    delivered: dict[tuple[int, str], Stored] = field(default_factory=dict)
    """What was drawn for whom and went out, by life and uid."""
    reached: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a worker of a role came to a point."""
    numbers: int = 0

    def number(self) -> int:
        """A number that was never used before."""
        self.numbers += 1
        return self.numbers

    def actor(self, role: str, worker: Worker, *, serial: bool = False) -> LocalActor:
        """Places and starts an actor."""
        actor = worker.actor = LocalActor(worker, role, serial=serial)
        self.actors.append(actor)
        self.places[actor] = 1
        return actor

    def recorder(self) -> LocalActor:
        """Places and starts the recorder, which is started again when it dies; what it owned is gone then."""

        def make(actor: LocalActor) -> Recorder:
            worker = Recorder(self)
            worker.actor = actor
            return worker

        actor = self.owner = RestartingActor(make, "recorder", on_death=self.lose_rollouts)
        self.actors.append(actor)
        self.places[actor] = 1
        return actor

    def lose_rollouts(self) -> None:
        """Every group that stands in the store goes away."""
        for handle in [handle for handle, value in self.store.values.items() if isinstance(value, Drawn)]:
            self.lost.add(self.store.values.pop(handle).uid)

    async def put_rollouts(self, drawn: Drawn) -> Stored:
        """Has the recorder own a group, when it is there."""
        while self.owner is not None and not self.owner.alive:
            if self.owner.ended:
                raise RecordError("store", found="no recorder", needed="one", action="Run the command again.")
            await asyncio.sleep(1.0)
        return self.store.put(drawn)

    def retire(self, actor: LocalActor) -> None:
        """Takes the place of an ended actor back."""
        if actor.alive:
            self.wrongs.append(f"the place of a living {actor.role} was given back")
        self.places[actor] = 0

    def living(self, role: str) -> list[LocalActor]:
        """Living actors of a role."""
        return [actor for actor in self.actors if actor.role == role and actor.alive]

    def strike(self, actor: LocalActor) -> None:
        """Kills an actor."""
        if actor.alive:
            self.struck.append(actor.role)
            actor.die()

    def lose_learner(self) -> None:
        """The learner's node goes away, and with it whatever bucket it has put."""
        for actor in self.living("learner"):
            self.strike(actor)
        for handle in [handle for handle, value in self.store.values.items() if not isinstance(value, Drawn)]:
            del self.store.values[handle]

    def check(self, holds: bool, wrong: str) -> None:
        """Writes down what does not hold."""
        if not holds:
            self.wrongs.append(wrong)

    def fetch(self, groups: Sequence[GroupHandle], where: str) -> list[Drawn]:
        """Reads groups, as every worker does."""
        return fetch_all(groups, self.store, fetch_payload, where=where)  # type: ignore[return-value]


class Worker:
    """What all roles share: they take time, and faults strike them where they were ordered to."""

    actor: LocalActor

    def __init__(self, world: World, role: str) -> None:
        self.world, self.role = world, role

    async def reach(self, point: str, seconds: float) -> None:
        """Takes ``seconds``; a fault that was ordered for this point strikes in the middle of them."""
        self.world.reached[self.role, point] += 1
        await asyncio.sleep(seconds / 2)
        for fault in self.world.faults:
            if (fault.role, fault.point) == (self.role, point):
                fault.after -= 1
                if fault.after < 0:
                    self.world.faults.remove(fault)
                    await self._suffer(fault.kind)
                break
        await asyncio.sleep(seconds / 2)

    async def _suffer(self, kind: str) -> None:
        match kind:
            case "die":
                self.world.strike(self.actor)
                await asyncio.sleep(0)  # nobody hears of it any more
                raise asyncio.CancelledError
            case "hang":
                self.world.struck.append(self.role)
                await asyncio.Event().wait()
            case "orphan":
                self.world.lose_learner()
            case "fail":
                self.world.struck.append(self.role)
                if self.role == "generation":
                    raise EngineError(self.role, found="a fault that was ordered", needed="none", action="None.")
                raise RuntimeError("the device is lost")

    async def __ray_ready__(self) -> None:
        await self.reach("create", 1.0)

    async def start(self) -> None:
        await self.reach("start", 40.0 if self.role == "learner" else 30.0)

    async def stop(self) -> None:
        await self.reach("stop", 0.1)


class Engine(Worker):
    """A generation replica: freezes what is in flight while weights come, and refuses what it may not draw."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "generation")
        self.weights: Weights = ()
        self.version: int | None = world.first_version
        self._settled = asyncio.Event()
        self._settled.set()
        self._coming: list[Weights] = []
        self._aborted = 0
        self._watch: asyncio.TimerHandle | None = None

    async def stream(
        self, prompts: Sequence[Prompt], num_samples: int, version: int, exact: bool
    ) -> AsyncIterator[GroupHandle]:
        await self._settled.wait()
        served, aborted, life = self.version, self._aborted, self.world.life
        if served is None or served < version or (exact and served != version):
            raise EngineError("engine", found=f"version {served}", needed=f"version {version}", action="Publish it.")
        oldest = self.weights
        for prompt in prompts:
            await self.reach("stream", 2.0)
            await self._settled.wait()
            if aborted != self._aborted or self.version is None:
                raise EngineError("engine", found="an update that failed", needed="weights", action="Publish them.")
            kept = self.world.delivered.get((life, prompt.uid))
            self.world.check(kept not in self.world.store.values, f"{prompt.uid} was there and is drawn again")
            drawn = await self.world.put_rollouts(Drawn(prompt.uid, self.world.number(), oldest, self.weights))
            yield GroupHandle(prompt.uid, drawn, 3, (4,) * num_samples, (served, self.version))
            self.world.delivered[life, prompt.uid] = drawn

    async def begin_update(self, version: int) -> None:
        self._abort()
        self._settled.clear()
        self.version, self._coming = None, []
        self._watch = asyncio.get_running_loop().call_later(UPDATE_TIMEOUT_S, self._abort)
        await self.reach("begin_update", 0.2)

    async def receive_bucket(self, handles: Sequence[Stored]) -> None:
        await self.reach("receive_bucket", 2.0)
        index, weights = self.world.store.get(*handles)
        if self._settled.is_set() or index != len(self._coming):
            self._abort()
            raise PublicationError("engine", found=f"bucket {index}", needed="the next one", action="Publish again.")
        self._coming.append(weights)

    async def finish_update(self, version: int, digest: str) -> None:
        await self.reach("finish_update", 0.2)
        whole = not self._settled.is_set() and digest == combine_digests([digest_of(w) for w in self._coming])
        if not whole or len(set(self._coming)) != 1:
            self._abort()
            raise PublicationError("engine", found="a part", needed="the whole model", action="Publish again.")
        self._serve(version, self._coming[0])

    async def load_folder(self, folder: Path, version: int, bucket_bytes: int) -> None:
        await self.begin_update(version)
        await self.reach("load_folder", 60.0)
        self._serve(version, ())

    async def reside(self, parts: Sequence[str]) -> None:
        """All is in memory always."""

    def _serve(self, version: int, weights: Weights) -> None:
        self.version, self.weights = version, weights
        self._close()

    def _abort(self) -> None:
        if not self._settled.is_set():
            self._aborted += 1
            self._close()

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._settled.set()


class Scorer(Worker):
    """Scores a group by the number of its draw, so that a score of another draw is noticed."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "scorer")

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        await self.reach("score", 0.5 * len(groups))
        found = self.world.fetch(groups, "scorer")
        return [
            tuple(Score(float(drawn.number)) for _ in group.completion_lengths)
            for group, drawn in zip(groups, found, strict=True)
        ]


class Recorder(Worker):
    """Keeps which draw of each group a step was recorded with."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "recorder")
        self._process = f"process {world.number()}"

    async def ping(self) -> str:
        return self._process

    async def record(self, stage: str, step: int, groups: Sequence[GroupHandle]) -> None:
        await self.reach("record", 0.2)
        self.world.disk[step] = tuple(drawn.number for drawn in self.world.fetch(groups, "recorder"))


class Meeting:
    """Where the ranks of one gang meet: a collective that the last of them ends."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._brought: dict[int, Any] = {}
        self._ended: asyncio.Future[dict[int, Any]] | None = None

    async def gather(self, rank: int, value: Any) -> Mapping[int, Any]:
        """Returns what every rank brought; waits for ever for one that is gone."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        ended = self._ended
        self._brought[rank] = value
        if len(self._brought) == self._num_ranks:
            brought, self._brought, self._ended = self._brought, {}, None
            ended.set_result(brought)
        return await asyncio.shield(ended)


class Rank(Worker):
    """One learner rank. It trains on whole groups, and looks closely at what it is given."""

    def __init__(self, world: World, rank: int, meeting: Meeting) -> None:
        super().__init__(world, "learner")
        self._rank, self._meeting = rank, meeting
        self.weights: Weights = ()

    async def update(self, groups: Sequence[GroupHandle]) -> dict[str, float]:
        await self.reach("read", 1.0)
        lost: tuple[str, ...] = ()
        drawn: list[Drawn] = []
        try:
            drawn = self.world.fetch(groups, "learner")
        except RolloutsLostError as error:
            lost = error.uids
        brought = await self._meeting.gather(self._rank, lost)
        if all_lost := [uid for uids in brought.values() for uid in uids]:
            raise RolloutsLostError.of("learner", all_lost, "with their node")
        await self.reach("update", 10.0)
        parts = await self._meeting.gather(self._rank, (list(groups), drawn))
        given = [pair for part in parts.values() for pair in zip(*part, strict=True)]
        numbers = await self._meeting.gather(self._rank, self.world.number())
        if self._rank == 0:
            check_step(self.world, self.weights, given)
        self.weights += (Update(numbers[0], tuple(sorted(group.uid for group, _ in given))),)
        return {"loss": 0.5}

    async def export_plan(self, bucket_bytes: int) -> list[list[str]]:
        return [["weight"]] * NUM_BUCKETS

    async def put_bucket(self, index: int) -> tuple[Any, str, int] | None:
        await self.reach("put_bucket", 0.1)
        if self._rank:
            return None
        return self.world.store.put((index, self.weights)), digest_of(self.weights), 100

    async def save(self, place: str) -> dict[str, FileEntry]:
        await self.reach("save", 2.0)
        self.world.saved.setdefault(place, {})[self._rank] = self.weights
        return {f"rank_{self._rank}": FileEntry(len(self.weights), "")}

    async def load(self, place: str) -> None:
        await self.reach("load", 2.0)
        self.weights = self.world.saved[place][self._rank]

    async def reside(self, parts: Sequence[str]) -> None:
        """All is in memory always."""


def digest_of(weights: Weights) -> str:
    """Tells weights of different histories apart."""
    return ",".join(str(update.number) for update in weights)


def check_step(world: World, weights: Weights, given: Sequence[tuple[GroupHandle, Drawn]]) -> None:
    """What has to be true of the groups that the next update of ``weights`` trains on."""
    step, size = len(weights), world.prompts_per_step
    uids = [group.uid for group, _ in given]
    due = list(world.expected[step * size : (step + 1) * size])
    world.check(sorted(uids) == sorted(due), f"step {step} trained {uids} and not {due}")
    recorded = sorted(world.disk.get(step, ()))
    world.check(recorded == sorted(d.number for _, d in given), f"step {step} is not what was recorded")
    for group, drawn in given:
        world.check(group.uid == drawn.uid, f"{group.uid} with the payload of {drawn.uid}")
        for drew, label in zip((drawn.oldest, drawn.newest), group.weight_versions, strict=True):
            world.check(weights[: len(drew)] == drew, f"step {step}: {group.uid} from weights that were lost")
            world.check(label == world.first_version + len(drew), f"step {step}: {group.uid} labelled {label}")
            old = step - len(drew)
            world.check(0 <= old <= world.max_staleness, f"step {step}: {group.uid} is {old} updates old")
        raw = {score.components.get("reward_model/raw") for score in group.scores}
        world.check(raw == {float(drawn.number)}, f"step {step}: {group.uid} with the scores of another draw")
