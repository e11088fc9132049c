"""The online loop over fakes: order, staleness, exactly-once, failures, cadence, metrics."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import EngineError, LearnerError, MissingFeedbackError, NonFiniteError, RlhfError, ScorerError
from rlhf.loops.online import train_online
from rlhf.types import Score
from tests.fakes import FakeRun, OpenGate, loop_config, make_group


def train(run: FakeRun, first_step: int = 0, first_version: int = 0, **changes) -> int:
    async def body() -> int:
        async with asyncio.timeout(10):
            done = await train_online(
                run.roles, loop_config(**changes), run.hooks, first_step=first_step, first_version=first_version
            )
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left behind"
        return done

    return asyncio.run(body())


def error(kind: type[RlhfError]) -> RlhfError:
    return kind("fake[0]", found="a fault", needed="none", action="Look.")


def behind(done: int) -> dict[str, dict[str, int]]:
    """The collector's state behind ``done`` steps of two prompts."""
    return {"cursor": {"position": 2 * done}, "rewards": {"num_scored": 2 * done}}


def kinds(run: FakeRun) -> list[str]:
    return [kind for kind, _ in run.log]


def test_a_synchronous_step_is_generate_score_annotate_record_update_publish_log() -> None:
    run = FakeRun()
    assert train(run, steps=2) == 2
    step = ["generate", "generated", "score", "annotate", "record", "update", "updated", "publish", "log"]
    assert kinds(run) == [*step, *step, "checkpoint"]
    assert run.gate.holders[:5] == ["generation", "critic", "learner", "publish", "generation"]


@pytest.mark.parametrize("gate", [None, OpenGate()])
@pytest.mark.parametrize("first_version", [0, 7])
def test_without_staleness_every_batch_is_drawn_from_the_weights_it_updates(gate, first_version: int) -> None:
    run = FakeRun(gate=gate, version=first_version)
    train(run, first_version=first_version, max_staleness=0)
    assert run.versions == [first_version + step for step in range(4)]
    assert all(run.exact), "neither older nor newer weights"
    assert all(metrics["rollout/staleness"] == 0 for metrics in run.metrics.values())


def test_with_staleness_one_the_next_step_is_generated_while_this_one_trains() -> None:
    run = FakeRun(gate=OpenGate())
    train(run, max_staleness=1)
    assert run.versions == [0, 0, 1, 2]
    assert not any(run.exact), "publication may come before an engine admits the next step"
    for step in range(3):
        # Generation calls come in step order, so the s-th "generate" is that of step s.
        starts = [i for i, kind in enumerate(kinds(run)) if kind == "generate"]
        assert starts[step + 1] < run.log.index(("updated", step)), f"step {step + 1} waited for update {step}"
    assert [run.metrics[step]["rollout/staleness"] for step in range(4)] == [0, 1, 1, 1]


@given(st.integers(1, 6), st.integers(0, 1), st.integers(1, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_prompt_is_trained_exactly_once_also_over_a_stop(
    steps: int, max_staleness: int, stop_after: int, exclusive: bool
) -> None:
    first = FakeRun(gate=None if exclusive else OpenGate())
    first.stop_after = stop_after
    done = train(first, steps=steps, max_staleness=max_staleness)
    assert done == min(steps, stop_after)
    state = json.loads(json.dumps(first.checkpoints[done]))
    assert state == behind(done), "no prompt and no score of a step that the checkpoint does not know"

    second = FakeRun(gate=OpenGate(), position=2 * done, version=done, num_scored=2 * done)
    assert train(second, first_step=done, steps=steps, max_staleness=max_staleness) == steps
    trained = [uid for run in (first, second) for batch in run.trained for uid in batch]
    assert trained == [f"p{i}" for i in range(2 * steps)]
    recorded = {**first.recorded, **second.recorded}
    assert [uid for step in range(steps) for uid in recorded[step]] == trained
    assert all(metrics["rollout/staleness"] <= max_staleness for metrics in second.metrics.values())


def test_a_stop_with_a_batch_in_flight_gives_its_prompts_out_again() -> None:
    run = FakeRun(gate=OpenGate())
    run.stop_after = 2
    assert train(run, max_staleness=1) == 2
    assert run.prompts.position > 4, "the collector was ahead"
    assert run.num_scored > 4, "and has scored ahead"
    assert run.checkpoints == {2: behind(2)}


def test_a_finished_run_has_nothing_to_do() -> None:
    run = FakeRun(version=4)
    assert train(run, first_step=4) == 4
    assert run.log == []


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("generate", EngineError),
        ("score", ScorerError),
        ("annotate", LearnerError),
        ("update", LearnerError),
        ("publish", RlhfError),
        ("record", RlhfError),
        ("evaluate", RlhfError),
        ("checkpoint", RlhfError),
    ],
)
def test_the_first_failure_ends_both_halves_and_is_raised_as_it_is(
    call: str, kind: type[RlhfError], max_staleness: int
) -> None:
    fault = error(kind)
    run = FakeRun(gate=OpenGate(), fail={(call, 1): fault})

    async def body() -> None:
        config = loop_config(max_staleness=max_staleness, evaluate_every=1, checkpoint_every=1)
        with pytest.raises(kind) as caught:
            async with asyncio.timeout(10):
                await train_online(run.roles, config, run.hooks)
        assert caught.value is fault
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


def test_the_batch_that_is_never_finite_is_kept_before_the_run_ends() -> None:
    run = FakeRun(fail={("update", 1): error(NonFiniteError)})
    with pytest.raises(NonFiniteError):
        train(run)
    assert run.recorded == {0: ("p0", "p1"), 1: ("p2", "p3")}
    assert list(run.metrics) == [0]


def test_cancelling_the_loop_ends_both_halves() -> None:
    run = FakeRun()

    async def body() -> None:
        task = asyncio.create_task(train_online(run.roles, loop_config(steps=1000), run.hooks))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


def test_missing_scores_pass_up_to_the_fraction_and_stop_the_run_above_it() -> None:
    def score(uid: str, sibling: int) -> Score:
        return Score(None, error="no answer") if (uid, sibling) == ("p0", 1) else Score(1.0)

    run = FakeRun()
    run.score_of = score
    assert train(run, steps=1, max_missing_fraction=0.25) == 1
    assert run.metrics[0]["rollout/missing_scores"] == 1
    assert run.metrics[0]["rollout/score"] == 1.0

    run = FakeRun()
    run.score_of = score
    with pytest.raises(MissingFeedbackError, match="scores of step 0"):
        train(run, steps=1, max_missing_fraction=0.24)
    assert run.trained == []


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_every_evaluation_is_followed_by_a_checkpoint_of_the_same_weights(max_staleness: int) -> None:
    run = FakeRun(gate=OpenGate())
    train(run, steps=7, evaluate_every=2, checkpoint_every=3, max_staleness=max_staleness)
    evaluated = [what for kind, what in run.log if kind == "evaluate"]
    assert evaluated == [2, 4, 6, 7]
    assert list(run.checkpoints) == [2, 3, 4, 6, 7]
    hooks = [call for call in run.log if call[0] in ("evaluate", "checkpoint")]
    for i, (kind, done) in enumerate(hooks):
        if kind == "evaluate":
            assert hooks[i + 1] == ("checkpoint", done)
    assert all(state == behind(done) for done, state in run.checkpoints.items())


def test_without_evaluations_only_the_cadence_and_the_end_make_checkpoints() -> None:
    run = FakeRun()
    train(run, steps=5, checkpoint_every=2)
    assert list(run.checkpoints) == [2, 4, 5]
    assert run.counts["evaluate"] == 0


def test_the_metrics_of_a_batch_by_hand() -> None:
    from dataclasses import replace

    from rlhf.loops.online import rollout_metrics

    groups = [
        replace(
            make_group("a", 2, (3, 5)),
            weight_versions=(2, 3),
            scores=(Score(1.0, {"judge": 2.0}), Score(3.0, {"judge": 4.0, "length": -1.0})),
        ),
        replace(make_group("b", 3, (4, 8)), scores=(Score(2.0, {"judge": 0.0}), Score(None, error="refused"))),
    ]
    metrics = rollout_metrics(groups, learner_version=4)
    assert metrics == {
        "rollout/completion_length": 5.0,
        "rollout/completion_tokens": 20.0,
        "rollout/missing_scores": 1.0,
        "rollout/staleness": 2.0,
        "rollout/score": 2.0,
        "rollout/score_std": pytest.approx((2 / 3) ** 0.5),
        "rollout/score/judge": 2.0,
        "rollout/score/length": -1.0,
    }


def test_metrics_carry_the_role_that_they_come_from() -> None:
    run = FakeRun()
    train(run, steps=1)
    assert run.metrics[0]["learner/loss"] == 0.5
    assert run.metrics[0]["publish/seconds"] == 0.25
    assert run.metrics[0]["rollout/score"] == 0.5
