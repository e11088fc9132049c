"""A weighted mixture of reward sources, itself a reward source."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from rlhf.protocols import RewardSource
from rlhf.rewards.config import RewardPart
from rlhf.rewards.normalise import RunningMoments
from rlhf.rewards.shaping import clip
from rlhf.types import GroupHandle, Score


def combine_scores(named: Sequence[tuple[str, float, Score]]) -> Score:
    """Returns the weighted sum of the parts of one completion; a missing part makes the sum missing.

    A part of weight 0 is only recorded, so the sum does without it where it is missing. The components of the result
    are each part's value under its name, and the part's own components under ``name/component``, so that the record
    shows what a reward is made of; its evidence is that of all parts.

    Args:
        named: Name, weight and score of each part.
    """
    components: dict[str, float] = {}
    errors = []
    total = 0.0
    evidence = tuple(handle for _, _, score in named for handle in score.evidence)
    for name, weight, score in named:
        components.update({f"{name}/{key}": value for key, value in score.components.items()})
        if score.value is None:
            if weight:
                errors.append(f"{name}: {score.error or 'missing'}")
            continue
        components[name] = score.value
        total += weight * score.value
    return Score(None if errors else total, components, "; ".join(errors), evidence)


class Mixture:
    """Asks every source in turn and adds up what they say, as the parts weigh it.

    A call that fails as a whole raises what its source raised, changes nothing and may be repeated. Sources are asked
    one after the other: they share the devices of one phase.

    Args:
        sources: In the order of ``parts``, each named after its part's source.
        parts: Weights, normalisation and clipping.
        moments: Running moments to start from.
        learn_moments: Whether the scored values count in the running moments.
    """

    name = "mixture"

    def __init__(
        self,
        sources: Sequence[RewardSource],
        parts: Sequence[RewardPart],
        *,
        moments: Mapping[str, RunningMoments] | None = None,
        learn_moments: bool = True,
    ) -> None:
        names = [source.name for source in sources]
        if names != [part.source for part in parts]:
            raise ValueError(f"sources {names} for parts {[part.source for part in parts]}")
        self._sources = tuple(sources)
        self._parts = tuple(parts)
        self._moments = dict(moments or {part.source: RunningMoments() for part in parts if part.normalise})
        self._learn_moments = learn_moments

    async def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """See ``RewardSource.score``."""
        asked = [await source.score(groups) for source in self._sources]
        for part, answer in zip(self._parts, asked, strict=True):  # after the last source: a failed call counts nowhere
            if part.normalise and self._learn_moments:
                self._moments[part.source].update(score.value for siblings in answer for score in siblings)
        answers = [
            [[self._shape(part, score) for score in siblings] for siblings in answer]
            for part, answer in zip(self._parts, asked, strict=True)
        ]
        return [
            tuple(self._combine([answer[g][k] for answer in answers]) for k in range(len(group.completion_lengths)))
            for g, group in enumerate(groups)
        ]

    def measuring(self) -> Mixture:
        """Returns the same mixture for validation, on the scale of this moment for good.

        Neither what it scores itself nor what is scored in training later moves its scale: numbers that are to be
        compared over a run, such as those that choose the best checkpoint, need one.
        """
        return Mixture(self._sources, self._parts, moments=copy.deepcopy(self._moments), learn_moments=False)

    def state(self) -> dict[str, dict[str, float]]:
        """Returns the running moments of the normalised parts, for a checkpoint."""
        return {name: moments.state() for name, moments in self._moments.items()}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Takes over what ``state`` returned."""
        for name, moments in self._moments.items():
            moments.restore(state[name])

    def _combine(self, scores: Sequence[Score]) -> Score:
        return combine_scores(
            [(part.source, part.weight, score) for part, score in zip(self._parts, scores, strict=True)]
        )

    def _shape(self, part: RewardPart, score: Score) -> Score:
        if score.value is None:
            return score
        if not part.normalise and part.clip is None:
            return score
        value = score.value
        if part.normalise:
            value = self._moments[part.source].normalise(value)
        if part.clip is not None:
            value = clip(value, *part.clip)
        return Score(value, {**score.components, "raw": score.value}, evidence=score.evidence)
