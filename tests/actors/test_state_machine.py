"""Ledger, buffer and fleets in any order of joins, leaves, deaths, publications, checkpoints and restarts.

Real: the prompt cursor, the loop with its buffer and gate, the fleets, the learner gang, publication, the mixture.
Simulated: Ray (``local_ray``) and what computes (``simulated_roles``). Time is virtual, so every timeout comes at once
and a deadlock is found instead of waited for.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable

import pytest
import ray
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf.errors import RlhfError
from tests.actors.simulated_driver import Driver, Plan, Saved
from tests.actors.simulated_roles import Drawn, Fault, World
from tests.virtual_time import VirtualTimeLoop

FLEETS = st.sampled_from(["generation", "generation", "scorer"])
POINTS = {
    "generation": [
        "create",
        "start",
        "stream",
        "begin_update",
        "receive_bucket",
        "finish_update",
        "load_folder",
        "stop",
    ],
    "scorer": ["create", "start", "score", "stop"],
    "learner": ["start", "read", "update", "put_bucket", "save", "load"],
}
PLACES = st.sampled_from([(role, point) for role, points in POINTS.items() for point in points])
ROLES = st.sampled_from(["generation", "generation", "scorer", "learner", "learner", "recorder"])
GAPS = [0.05, 1.0, 10.0, 25.0]
_READERS = [("scorer", "score"), ("recorder", "record"), ("learner", "read")]
READERS = st.sampled_from(_READERS)
KINDS = st.sampled_from(["die", "die", "die", "hang", "fail"])
PLANS = st.builds(
    Plan,
    steps=st.integers(5, 12),
    prompts_per_step=st.integers(2, 4),
    max_staleness=st.integers(0, 1),
    checkpoint_every=st.integers(1, 4),
    evaluate_every=st.sampled_from([0, 2]),
    replicas=st.integers(1, 3),
    num_scorers=st.integers(1, 2),
    num_ranks=st.integers(1, 2),
    exclusive=st.booleans(),
    max_restarts=st.sampled_from([1, 3, 3, 1000]),
)
MOST_REPLICAS = 3
LIMIT_S = 30 * 24 * 3600.0


@pytest.fixture(autouse=True, scope="module")
def local_kill():
    patch = pytest.MonkeyPatch()
    patch.setattr(ray, "kill", lambda actor, no_restart=True: actor.end() if no_restart else actor.die())
    yield
    patch.undo()


class OnlineRun(RuleBasedStateMachine):
    """A run, and all that can happen to it.

    Always: no prompt is trained out of turn, twice or not at all in the history of the weights; what is trained was
    recorded, scored as it is and drawn from weights of that history that are as old as the loop allows; a validation is
    drawn from the weights that it validates; a checkpoint goes on behind them. A driver fails only of more faults than
    the rules promise to outlive, its fleets replace no more than they may and nobody without a loss, and it gives every
    place back. In the end everything is trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.plan: Plan
        self.world: World
        self.driver: Driver
        self.task: asyncio.Task[int]
        self.checkpoints: list[Saved] = []
        self.is_finished = False

    @initialize(plan=PLANS)
    def begin(self, plan: Plan) -> None:
        self.plan, self.world = plan, plan.world()
        self._start()
        self._pass_until(("generation", "stream"))

    def _start(self) -> None:
        async def start() -> None:
            self.driver = Driver(self.world, self.plan, self.checkpoints)
            self.task = asyncio.create_task(self.driver.run())

        self.loop.run_until_complete(start())

    def _pass(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.wait({self.task}, timeout=seconds))
        if self.task.done():
            self._ended()

    def _ended(self) -> None:
        """The driver has ended by itself: it is run again unless it has finished."""
        self.loop.run_until_complete(asyncio.sleep(1.0))  # a placement that was given up ends in its thread
        error = self.task.exception()
        if error is not None:
            if not isinstance(error, RlhfError):
                raise error
            assert self._is_excused(), f"one fault must not end a run: {error}"
        left = [actor.role for actor in self.world.actors if actor.alive or self.world.places[actor]]
        assert left == [], f"the driver left {left} behind"
        if error is None:
            assert self.checkpoints[-1].step == self.task.result(), "a stop and the end save what was done"
        if error is None and self.task.result() == self.plan.steps:
            self.is_finished = True
        else:
            self._start()

    def _is_excused(self) -> bool:
        """Whether some role was struck twice within a few steps, or too often for it."""
        marks = self.driver.marks
        recent = Counter(self.world.struck) - marks[max(len(marks) - 3, 0)]
        in_all = Counter(self.world.struck) - marks[0]
        most = max(in_all[role] for role in ("generation", "scorer", "learner", "recorder"))
        return max(recent.values(), default=0) > 1 or most > self.plan.max_restarts

    @rule(seconds=st.sampled_from([0.3, 1.0, 3.0, 10.0, 30.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(where=PLACES)
    def somebody_comes_to(self, where: tuple[str, str]) -> None:
        self._pass_until(where)

    def _pass_until(self, where: tuple[str, str], times: int = 1) -> None:
        wanted = self.world.reached[where] + times
        for _ in range(400):
            if self.is_finished or self.world.reached[where] >= wanted:
                break
            self._pass(0.5)

    @precondition(lambda self: not self.is_finished)
    @rule(role=FLEETS, num_replicas=st.integers(1, 3))
    def scale(self, role: str, num_replicas: int) -> None:
        self.driver.scale(role, num_replicas)
        self._pass(0.05)

    def _is_calm(self) -> bool:
        """Whether the run may be struck again: one that is struck all the time never gets anywhere."""
        marks = self.driver.marks
        recent = Counter(self.world.struck) - marks[max(len(marks) - 2, 0)]
        return not self.is_finished and sum(recent.values()) + len(self.world.faults) < 2

    @precondition(_is_calm)
    @rule(after=st.integers(1, 3))
    def a_replica_dies_in_the_middle_of_its_stream(self, after: int) -> None:
        self.world.faults.append(Fault("generation", "stream", "die", after))
        self._pass_until(("generation", "stream"), times=after + 1)

    @precondition(_is_calm)
    @rule(where=PLACES, kind=KINDS, after=st.sampled_from([0, 0, 1, 2, 5]))
    def a_fault_waits(self, where: tuple[str, str], kind: str, after: int) -> None:
        self.world.faults.append(Fault(*where, kind, after))
        self._pass(0.05)

    @precondition(_is_calm)
    @rule(after=st.sampled_from([0, 1, 2, 5]))
    def the_learner_goes_away_with_a_bucket(self, after: int) -> None:
        self.world.faults.append(Fault("generation", "receive_bucket", "orphan", after))
        self._pass_until(("generation", "receive_bucket"), times=after + 1)

    @precondition(_is_calm)
    @rule(
        roles=st.lists(ROLES, min_size=1, max_size=2, unique=True), which=st.integers(0, 3), gap=st.sampled_from(GAPS)
    )
    def workers_die(self, roles: list[str], which: int, gap: float) -> None:
        """One worker, or two of different roles shortly after each other, whatever they are at."""
        for role in roles:
            if living := self.world.living(role):
                self._do(functools.partial(self.world.strike, living[which % len(living)]))
            self._pass(gap)

    @precondition(_is_calm)
    @rule(before=READERS, which=st.sets(st.integers(0, 3), min_size=1))
    def rollouts_are_lost(self, before: tuple[str, str], which: set[int]) -> None:
        """A node goes away with some of the newest groups, just when somebody is about to read them."""
        self._pass_until(before)
        held = [handle for handle, value in self.world.store.values.items() if isinstance(value, Drawn)]
        for handle in {held[-1 - i % len(held)] for i in which} if held else ():
            self.world.lost.add(self.world.store.values.pop(handle).uid)
        self.world.struck.append("store")
        self._pass(0.05)

    @precondition(_is_calm)
    @rule(at=st.sampled_from([*_READERS, ("generation", "stream"), ("learner", "update")]), in_it=st.booleans())
    def the_recorder_dies(self, at: tuple[str, str], in_it: bool) -> None:
        """With all rollouts, when somebody has come to one of these points, or in the middle of its next record."""
        self._pass_until(at)
        if in_it:
            self.world.faults.append(Fault("recorder", "record", "die"))
        for actor in () if in_it else self.world.living("recorder"):
            self._do(functools.partial(self.world.strike, actor))
        self._pass(0.05)

    @precondition(lambda self: not self.is_finished)
    @rule()
    def the_driver_is_told_to_stop(self) -> None:
        self.driver.stopping = True
        self._pass(20.0)

    @precondition(lambda self: not self.is_finished)
    @rule()
    def the_driver_is_killed(self) -> None:
        """SIGKILL on a private cluster: everything but the disk is gone, and the command is run again."""
        self._end_all()
        self._start()
        self._pass(1.0)

    def _do(self, action: Callable[[], None]) -> None:
        async def act() -> None:
            action()

        self.loop.run_until_complete(act())

    def _end_all(self) -> None:
        async def end() -> None:
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in others:
                    task.cancel()
                await asyncio.wait(others)
            for actor in self.world.actors:
                actor.end()
                self.world.places[actor] = 0
            self.world.store.values.clear()

        self.loop.run_until_complete(end())

    @invariant()
    def nothing_went_wrong(self) -> None:
        if hasattr(self, "world"):
            assert self.world.wrongs == []
            struck = Counter(self.world.struck) - self.driver.marks[0]
            for role, fleet in self.driver.fleets.items():
                taken = fleet._restarts.num_taken
                losses = sum(struck.values()) if struck[role] else 0  # what ends a step ends a replacement under way
                restarts = MOST_REPLICAS * self.plan.max_restarts
                assert taken <= min(losses, restarts), f"{taken} {role} restarts for {losses} losses"
                most = self.driver.allowed[role] + restarts + struck[role]  # one that never ran is created again
                assert self.driver.spawned[role] <= most, f"{self.driver.spawned[role]} {role} replicas were started"

    def teardown(self) -> None:
        """Whatever has happened, the run comes to its end once no more does."""
        try:
            if hasattr(self, "task"):
                self.world.faults.clear()
                self._come_to_the_end()
        finally:
            self._close()

    def _come_to_the_end(self) -> None:
        for _ in range(4):
            if not self.is_finished:
                self._pass(LIMIT_S)
        self.nothing_went_wrong()
        assert self.is_finished, "the run hangs"
        kept = self.world.saved[self.checkpoints[-1].folder][0]
        trained = Counter(uid for update in kept for uid in update.uids)
        assert trained == Counter(self.world.expected), "every prompt once"
        assert set(self.world.disk) == set(range(self.plan.steps)), "every step is on record"

    def _close(self) -> None:
        if hasattr(self, "world"):
            self._end_all()
        self.loop.close()


TestOnlineRun = OnlineRun.TestCase
TestOnlineRun.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
