"""The mixture: weights, missing parts, normalisation and clipping."""

from __future__ import annotations

import asyncio
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import StrictModel, validate
from rlhf.errors import ConfigError, RolloutsLostError, ScorerError
from rlhf.protocols import RewardSource
from rlhf.rewards.config import RewardParts
from rlhf.rewards.mixture import Mixture, combine_scores
from rlhf.rewards.normalise import RunningMoments
from rlhf.types import GroupHandle, RolloutStatus, Score


class Stage(StrictModel):
    rewards: RewardParts


class FakeSource:
    """Gives out prepared scores, one list per group and call."""

    def __init__(self, name, *calls):
        self.name = name
        self._calls = iter(calls)

    async def score(self, groups):
        values = next(self._calls)
        if isinstance(values, Exception):
            raise values
        return [
            tuple(Score(v, {"part": v}) if v is not None else Score(None, error="timeout") for v in g) for g in values
        ]


def parts(*settings):
    return validate(Stage, {"rewards": list(settings)}, "config").rewards


def handles(*sizes):
    return [GroupHandle(f"u{i}", None, 1, (1,) * size, (0, 0)) for i, size in enumerate(sizes)]


def score(mixture: RewardSource, *sizes):
    return asyncio.run(mixture.score(handles(*sizes)))


MODEL, JUDGE = {"source": "reward_model"}, {"source": "judge", "weight": -0.5}


def test_parts_add_up_with_their_weights_and_are_kept():
    sources = [FakeSource("reward_model", [[1.0, 2.0], [3.0]]), FakeSource("judge", [[4.0, 0.0], [2.0]])]
    scores = score(Mixture(sources, parts(MODEL, JUDGE)), 2, 1)
    assert [[s.value for s in siblings] for siblings in scores] == [[-1.0, 2.0], [2.0]]
    assert scores[0][0].components == {"reward_model": 1.0, "reward_model/part": 1.0, "judge": 4.0, "judge/part": 4.0}


def test_a_missing_part_makes_the_sum_missing_and_says_which():
    sources = [FakeSource("reward_model", [[1.0, 2.0]]), FakeSource("judge", [[None, 0.0]])]
    ((first, second),) = score(Mixture(sources, parts(MODEL, JUDGE)), 2)
    assert (first.value, first.status) == (None, RolloutStatus.MISSING)
    assert first.error == "judge: timeout"
    assert first.components == {"reward_model": 1.0, "reward_model/part": 1.0}
    assert second.value == 2.0
    assert combine_scores([("a", 1.0, Score(None)), ("b", 1.0, Score(None))]).error == "a: missing; b: missing"


def test_the_verdicts_behind_a_score_stay_with_the_mixture():
    class Judge:
        name = "judge"

        async def score(self, groups):
            return [(Score(1.0, evidence=("said",)), Score(None, error="timeout", evidence=("said",)))]

    sources = [FakeSource("reward_model", [[1.0, 2.0]]), Judge()]
    shaped = parts(MODEL, JUDGE | {"clip": [0.0, 0.5]})
    assert [one.evidence for one in score(Mixture(sources, shaped), 2)[0]] == [("said",), ("said",)]


def test_the_loss_of_a_source_is_not_swallowed():
    lost = ScorerError("judge", found="a dead fleet", needed="a replica", action="See the log.")
    with pytest.raises(ScorerError):
        score(Mixture([FakeSource("judge", lost)], parts({"source": "judge"})), 1)


def test_a_call_that_failed_half_way_counts_nowhere_and_may_be_repeated():
    lost = RolloutsLostError.of("judge", ["p0"], "a node went away")
    sources = [FakeSource("reward_model", [[1.0, 3.0]], [[1.0, 3.0]]), FakeSource("judge", lost, [[0.0, 0.0]])]
    mixture = Mixture(sources, parts({**MODEL, "normalise": True}, JUDGE))
    untouched = mixture.state()
    with pytest.raises(RolloutsLostError):
        score(mixture, 2)
    assert mixture.state() == untouched
    score(mixture, 2)
    assert mixture.state()["reward_model"]["count"] == 2


def test_normalised_parts_follow_what_was_scored_and_validation_changes_nothing():
    source = FakeSource("judge", [[1.0, 3.0, None]], [[5.0]], [[3.0]])
    mixture = Mixture([source], parts({"source": "judge", "normalise": True}))
    ((low, high, missing),) = score(mixture, 3)
    assert (low.value, high.value, missing.value) == (-1.0, 1.0, None)
    assert low.components == {"judge": -1.0, "judge/part": 1.0, "judge/raw": 1.0}
    before = mixture.state()
    ((measured,),) = score(mixture.measuring(), 1)
    assert measured.value == 3.0
    assert mixture.state() == before
    resumed = Mixture([FakeSource("judge", [[3.0]])], parts({"source": "judge", "normalise": True}))
    resumed.restore(json.loads(json.dumps(before)))
    assert score(resumed, 1) == score(mixture, 1)


def test_parts_are_clipped_after_scaling():
    source = FakeSource("judge", [[-9.0, 0.5]])
    ((low, inside),) = score(Mixture([source], parts({"source": "judge", "clip": [-1, 1], "weight": 2.0})), 2)
    assert (low.value, inside.value) == (-2.0, 1.0)
    assert (low.components["judge/raw"], inside.components["judge/raw"]) == (-9.0, 0.5), "a mean over all of them"


def test_a_part_that_is_only_recorded_may_be_missing():
    sources = [FakeSource("reward_model", [[1.0, 2.0]]), FakeSource("judge", [[None, 4.0]])]
    ((first, second),) = score(Mixture(sources, parts(MODEL, {"source": "judge", "weight": 0})), 2)
    assert (first.value, first.error) == (1.0, "")
    assert first.components == {"reward_model": 1.0, "reward_model/part": 1.0}
    assert (second.value, second.components["judge"]) == (2.0, 4.0)


def test_a_validation_keeps_the_scale_of_its_first_time():
    source = FakeSource("judge", [[1.0, 3.0]], [[5.0]], [[10.0, 30.0]], [[5.0]], [[5.0]])
    settings = parts({"source": "judge", "normalise": True})
    mixture = Mixture([source], settings)
    score(mixture, 2)
    validation = mixture.measuring()
    first = score(validation, 1)
    score(mixture, 2)
    assert score(validation, 1) == first, "training went on, and the scale stayed"
    resumed = Mixture([source], settings).measuring()
    resumed.restore(json.loads(json.dumps(validation.state())))
    assert score(resumed, 1) == first


def test_sources_must_be_those_of_the_parts():
    with pytest.raises(ValueError, match="sources"):
        Mixture([FakeSource("judge")], parts(MODEL))


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [{"source": "judge"}, {"source": "judge"}],
        [{"source": "judge", "weight": 0}],
        [{"source": "judge", "clip": [1, -1]}],
        [{"source": "rules", "rules": []}],
        [{"source": "oracle"}],
    ],
)
def test_impossible_mixtures_are_config_errors(settings):
    with pytest.raises(ConfigError):
        parts(*settings)


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_running_moments_equal_those_of_all_values_and_resume(values, cut):
    moments = RunningMoments()
    moments.update(values[:cut])
    resumed = RunningMoments()
    resumed.restore(moments.state())
    resumed.update([*values[cut:], None])
    assert resumed.count == len(values)
    assert resumed.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    expected = statistics.pstdev(values)
    if expected > 1e-6:
        assert resumed.std == pytest.approx(expected, rel=1e-6)


def test_running_moments_refuse_what_is_no_number():
    with pytest.raises(ValueError, match="nan"):
        RunningMoments().update([float("nan")])
    assert RunningMoments().std == 1.0
