"""The shared gate: room is made before it is taken, and a move that went wrong is not trusted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rlhf.loops.shared_gate import SharedGate
from tests.fakes import breathe

TIMEOUT = 60.0
ENGINE = frozenset({"weights", "cache"})
LEARNER = frozenset({"weights", "state"})
WEIGHTS = frozenset({"weights"})
PARTS = {"engine": ENGINE, "learner": LEARNER, "scorer": WEIGHTS}
PHASES = {
    "engine": {"engine": ENGINE},
    "learner": {"learner": LEARNER},
    "scorer": {"scorer": WEIGHTS},
    "publish": {"learner": WEIGHTS, "engine": WEIGHTS},
}


class Device:
    """What is in the memory of one device, and a line for every move."""

    def __init__(self) -> None:
        self.resident: dict[str, frozenset[str]] = {}
        self.log: list[tuple[str, ...]] = []
        self.needed: set[tuple[str, str]] = set()
        self.strangers: set[tuple[str, str]] = set()
        self.fail: str | None = None
        self.late = False

    def join(self, gate: SharedGate, roles: Iterable[str] = PARTS) -> None:
        for role in roles:
            self.resident[role] = PARTS[role]
            gate.join(role, PARTS[role], lambda parts, role=role: self.move(role, parts))

    async def move(self, role: str, parts: frozenset[str]) -> None:
        await breathe(2)
        self.log.append((role, *sorted(parts)))
        if self.fail == role and not self.late:
            raise RuntimeError(role)
        if parts - self.resident[role]:  # something comes in: nobody else's may still be there
            self.strangers |= {(r, part) for r, here in self.resident.items() for part in here} - self.needed
            self.strangers |= {(role, part) for part in parts} - self.needed
        await breathe(2)
        self.resident[role] = parts
        if self.fail == role:
            raise RuntimeError(role)

    def holds(self) -> dict[str, frozenset[str]]:
        return {role: parts for role, parts in self.resident.items() if parts}


def run(body) -> None:
    asyncio.run(asyncio.wait_for(body(), TIMEOUT))


def test_everything_else_is_put_aside_before_what_is_missing_comes_in() -> None:
    async def body() -> None:
        gate, device = SharedGate(PHASES), Device()
        device.join(gate)
        expected = [
            ("engine", [("learner",), ("scorer",)]),
            ("scorer", [("engine",), ("scorer", "weights")]),
            ("learner", [("scorer",), ("learner", "state", "weights")]),
            ("learner", []),
            ("publish", [("learner", "weights"), ("engine", "weights")]),
            ("engine", [("learner",), ("engine", "cache", "weights")]),
            ("publish", [("engine", "weights"), ("learner", "weights")]),
            ("unnamed", []),
        ]
        for phase, moves in expected:
            device.log.clear()
            async with gate.hold(phase):
                assert device.log == moves, phase
                if phase in PHASES:
                    assert device.holds() == PHASES[phase]

    run(body)


def test_phases_come_one_at_a_time_in_order_of_arrival_and_others_never_wait() -> None:
    async def body() -> None:
        gate, device = SharedGate(PHASES), Device()
        device.join(gate)
        order: list[str] = []

        async def use(phase: str) -> None:
            async with gate.hold(phase):
                order.append(phase)
                await breathe()
                assert device.holds() == PHASES[phase]

        async with gate.hold("engine"):
            waiting = [asyncio.create_task(use(phase)) for phase in ("learner", "publish", "engine", "scorer")]
            await breathe()
            async with gate.hold("on a CPU"):
                assert order == []
        await asyncio.gather(*waiting)
        assert order == ["learner", "publish", "engine", "scorer"]

    run(body)


@pytest.mark.parametrize("late", [False, True], ids=["before it moved", "after it moved"])
@pytest.mark.parametrize("failing", ["engine", "learner"])
def test_a_move_that_fails_ends_its_phase_and_the_next_one_starts_from_nothing(failing: str, late: bool) -> None:
    async def body() -> None:
        gate, device = SharedGate(PHASES), Device()
        device.join(gate)
        async with gate.hold("engine"):
            pass
        device.fail, device.late = failing, late  # the one that has to go, or the one that has to come
        with pytest.raises(RuntimeError, match=failing):
            async with gate.hold("learner"):
                raise AssertionError("a phase without its memory")
        device.fail = None
        device.log.clear()
        async with gate.hold("publish"):
            assert device.holds() == PHASES["publish"]
        assert (failing,) in device.log[:2], "a role in an unknown state is put aside as a whole"

    run(body)


def test_a_phase_that_is_cancelled_while_memory_moves_gives_its_turn_back() -> None:
    async def body() -> None:
        gate, device = SharedGate(PHASES), Device()
        device.join(gate)
        async with gate.hold("engine"):
            pass
        cancelled = asyncio.create_task(gate.hold("learner").__aenter__())
        await breathe(4)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        async with gate.hold("learner"):
            assert device.holds() == PHASES["learner"]

    run(body)


def test_a_role_that_left_is_not_moved() -> None:
    async def body() -> None:
        gate, device = SharedGate(PHASES), Device()
        device.join(gate, ["engine", "learner"])
        gate.leave("engine")
        gate.leave("scorer")
        async with gate.hold("publish"):
            pass
        assert device.log == [("learner", "weights")]

    run(body)


class SharedDevice(RuleBasedStateMachine):
    """Any order of phases, failures, cancellations, roles that come and go."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.gate, self.device = SharedGate(PHASES), Device()
        self.device.join(self.gate)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.close()

    def _run(self, body) -> None:
        self.loop.run_until_complete(asyncio.wait_for(body, TIMEOUT))

    def _start(self, phase: str) -> None:
        self.device.needed = {(role, part) for role, parts in PHASES[phase].items() for part in parts}
        self.device.strangers = set()

    @invariant()
    def nothing_came_in_beside_what_was_not_needed(self) -> None:
        if hasattr(self, "device"):
            assert not self.device.strangers

    @rule(role=st.sampled_from(sorted(PARTS)))
    def starts(self, role: str) -> None:
        self._start(role)

        async def body() -> None:
            async with self.gate.hold(role):
                if role not in self.device.resident:
                    self.device.join(self.gate, [role])

        self._run(body())

    @rule(role=st.sampled_from(sorted(PARTS)))
    def ends(self, role: str) -> None:
        self.gate.leave(role)
        self.device.resident.pop(role, None)

    @rule(phase=st.sampled_from(sorted(PHASES)))
    def computes(self, phase: str) -> None:
        async def body() -> None:
            async with self.gate.hold(phase):
                wanted = {role: parts for role, parts in PHASES[phase].items() if role in self.device.resident}
                assert self.device.holds() == wanted

        self._start(phase)
        self._run(body())

    @rule(phase=st.sampled_from(sorted(PHASES)), role=st.sampled_from(sorted(PARTS)), late=st.booleans())
    def fails(self, phase: str, role: str, late: bool) -> None:
        async def body() -> None:
            try:
                async with self.gate.hold(phase):
                    pass
            except RuntimeError as error:
                assert str(error) == role

        self._start(phase)
        self.device.fail, self.device.late = role, late
        self._run(body())
        self.device.fail = None

    @rule(phase=st.sampled_from(sorted(PHASES)), after=st.integers(0, 20))
    def is_cancelled(self, phase: str, after: int) -> None:
        async def hold() -> None:
            async with self.gate.hold(phase):
                await breathe(2)

        async def body() -> None:
            task = asyncio.create_task(hold())
            await breathe(after)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._start(phase)
        self._run(body())

    @invariant()
    def nobody_is_left_holding(self) -> None:
        if hasattr(self, "gate"):
            assert self.gate._turn._free == pytest.approx(1.0)


TestSharedDevice = SharedDevice.TestCase
TestSharedDevice.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
