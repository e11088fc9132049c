"""Groups that are lost: drawn again, brought to where the others stand, which stay as they are."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rlhf.errors import MissingFeedbackError, RolloutsLostError, ValueLostError
from rlhf.loops.online import train_online
from rlhf.loops.rollouts import MAX_REDRAWS, repeated
from rlhf.types import Score
from tests.fakes import FakeRun, OpenGate, loop_config


def lost(*uids: str) -> RolloutsLostError:
    return RolloutsLostError.of("fake[0]", uids, "a node went away")


def train(run: FakeRun, roles=None, **changes) -> int:
    async def body() -> int:
        async with asyncio.timeout(10):
            return await train_online(roles or run.roles, loop_config(**changes), run.hooks)

    return asyncio.run(body())


def assert_step_is_whole(run: FakeRun, step: int) -> None:
    """What was trained on has scores and annotations of its own draw, and is what was recorded."""
    for group in run.trained_groups[step]:
        assert [score.value for score in group.scores] == [0.0, 1.0]
        assert group.annotations["values"].startswith(f"{group.payload}, call")
    assert [g.payload for g in run.recorded_groups[step]] == [g.payload for g in run.trained_groups[step]]


@pytest.mark.parametrize("gate", [None, OpenGate()])
@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("call", ["score", "annotate", "record", "update"])
def test_a_lost_group_is_drawn_again_and_its_siblings_in_the_step_stay(call: str, max_staleness: int, gate) -> None:
    run = FakeRun(gate=gate, fail={(call, 1): lost("p3")})
    assert train(run, steps=3, max_staleness=max_staleness) == 3
    assert run.trained == [("p0", "p1"), ("p2", "p3"), ("p4", "p5")], "in order, each prompt once"
    assert sorted(run.drawn) == [("p0", "p1"), ("p2", "p3"), ("p3",), ("p4", "p5")]
    kept, again = run.trained_groups[1]
    assert kept.payload == f"p2, draw {run.drawn.index(('p2', 'p3')) + 1}"
    assert again.payload == f"p3, draw {run.drawn.index(('p3',)) + 1}"
    for step in range(3):
        assert_step_is_whole(run, step)
    ((kind, fields),) = run.events
    assert (kind, fields["where"], fields["uids"]) == ("rollouts_drawn_again", "step 1", ["p3"])
    assert "a node went away" in fields["error"]
    assert [run.metrics[step]["rollout/drawn_again"] for step in range(3)] == [0, 1, 0]


def test_without_staleness_a_second_draw_is_from_the_weights_of_its_step() -> None:
    run = FakeRun(fail={("update", 1): lost("p3")})
    train(run, steps=3, max_staleness=0)
    assert run.versions == [0, 1, 1, 2]
    assert all(metrics["rollout/staleness"] == 0 for metrics in run.metrics.values())


def test_a_group_that_keeps_its_place_keeps_its_annotations() -> None:
    run = FakeRun(fail={("update", 0): lost("p1")})
    train(run, steps=1)
    kept, again = run.trained_groups[0]
    assert kept.annotations == {"values": "p0, draw 1, call 1"}
    assert again.annotations == {"values": "p1, draw 2, call 2"}


def test_groups_may_be_lost_one_after_another() -> None:
    run = FakeRun(fail={("score", 0): lost("p0"), ("annotate", 0): lost("p1"), ("score", 3): lost("p2")})
    assert train(run, steps=2) == 2
    assert [fields["uids"] for _, fields in run.events] == [["p0"], ["p1"], ["p2"]]
    assert run.metrics[0]["rollout/drawn_again"] == 2
    assert_step_is_whole(run, 0)


def test_a_group_may_be_lost_again_but_not_for_ever() -> None:
    run = FakeRun(fail={("score", 0): lost("p0", "p1"), ("annotate", 0): lost("p0"), ("update", 0): lost("p0")})
    assert train(run, steps=1) == 1
    assert run.drawn == [("p0", "p1"), ("p0", "p1"), ("p0",), ("p0",)]
    assert run.metrics[0]["rollout/drawn_again"] == 2
    assert_step_is_whole(run, 0)

    last = lost("p0")
    run = FakeRun(fail={("score", call): last if call == MAX_REDRAWS else lost("p0") for call in range(9)})
    with pytest.raises(RolloutsLostError) as caught:
        train(run, steps=1)
    assert caught.value is last
    assert run.trained == [] and len(run.events) == MAX_REDRAWS


def test_a_group_may_be_lost_again_while_it_is_brought_up() -> None:
    # The second scoring is of p1 alone, which is gone once more.
    run = FakeRun(fail={("update", 0): lost("p1"), ("score", 1): lost("p1")})
    assert train(run, steps=1) == 1
    assert run.drawn == [("p0", "p1"), ("p1",), ("p1",)]
    assert_step_is_whole(run, 0)


def test_work_that_draws_for_itself_is_repeated_from_its_start_but_not_for_ever() -> None:
    def repeat(num_losses: int) -> tuple[int, list[str]]:
        calls, told = 0, []

        async def work() -> int:
            nonlocal calls
            calls += 1
            if calls <= num_losses:
                gone = ValueLostError("store", found="a value", needed="it", action="None.")
                raise lost("p0") if calls % 2 else gone
            return calls

        return asyncio.run(repeated(work, lambda error: told.append(error.where))), told

    assert repeat(0) == (1, [])
    assert repeat(2) == (3, ["fake[0]", "store"])
    assert repeat(MAX_REDRAWS)[0] == MAX_REDRAWS + 1
    with pytest.raises(ValueLostError):
        repeat(MAX_REDRAWS + 1)


def test_another_group_may_be_lost_while_one_is_brought_up() -> None:
    # The second annotation is the one that brings p1 up; it finds p0 gone.
    run = FakeRun(fail={("update", 0): lost("p1"), ("annotate", 1): lost("p0")})
    assert train(run, steps=1) == 1
    assert run.drawn == [("p0", "p1"), ("p1",), ("p0",)]
    assert_step_is_whole(run, 0)


def test_a_group_of_another_step_is_nobody_s_to_draw() -> None:
    fault = lost("p9")
    run = FakeRun(fail={("update", 0): fault})
    with pytest.raises(RolloutsLostError) as caught:
        train(run, steps=1)
    assert caught.value is fault and run.events == []


def test_a_learner_that_has_updated_does_not_update_again() -> None:
    critic, run = FakeRun(gate=OpenGate()), FakeRun(gate=OpenGate(), fail={("update", 0): lost("p1")})
    roles = replace(run.roles, learners={"critic": critic, "learner": run})
    assert train(run, roles, steps=1) == 1
    assert len(critic.trained) == len(run.trained) == 1


def test_a_second_draw_that_nobody_can_score_counts_as_missing() -> None:
    run = FakeRun(fail={("update", 0): lost("p1")})
    run.score_of = lambda uid, _: Score(None, error="no answer") if len(run.drawn) > 1 and uid == "p1" else Score(1.0)
    with pytest.raises(MissingFeedbackError, match="scores of step 0"):
        train(run, steps=1)
    assert run.trained == []
