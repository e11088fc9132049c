"""The reward model at inference: plain torch, siblings of a prompt in one row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from actors.frozen import FrozenWorker
from actors.health import observed
from actors.training_groups import frozen_scores
from rlhf.errors import ConfigError
from rlhf.models.load import load_scalar
from rlhf.types import GroupHandle, Score

NORMALISER_FILE = "rlhf-reward.json"


@dataclass(frozen=True, slots=True)
class ScoreNormaliser:
    """Makes scores (value - mean) / std; a reward model's zero and unit mean nothing by themselves.

    Attributes:
        mean: Of the scores that it was fitted on.
        std: Their standard deviation, above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def write(self, folder: Path) -> None:
        """Saves the two numbers beside the reward model."""
        text = json.dumps({"mean": self.mean, "std": self.std}, indent=2)
        (folder / NORMALISER_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ScoreNormaliser:
        """Reads them; without a file scores stay as they are.

        Raises:
            ConfigError: The file does not hold two finite numbers, the second above 0.
        """
        path = folder / NORMALISER_FILE
        if not path.is_file():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            normaliser = cls(float(found["mean"]), float(found["std"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _bad_normaliser(path, f"{type(error).__name__}: {error}") from None
        if not (math.isfinite(normaliser.mean) and math.isfinite(normaliser.std) and normaliser.std > 0):
            raise _bad_normaliser(path, f"mean {normaliser.mean}, std {normaliser.std}")
        return normaliser


def _bad_normaliser(path: Path, found: str) -> ConfigError:
    return ConfigError(
        str(path), found=found, needed="finite mean and std, std above 0", action="Mend or delete the file."
    )


class ScorerWorker(FrozenWorker):
    """Scores rollout groups with a reward model; arguments as for ``FrozenWorker``."""

    _normaliser: ScoreNormaliser

    def _load(self) -> nn.Module:
        """Loads the model and its normaliser.

        Raises:
            ConfigError: The folder holds no reward model: a language model's head would be drawn at random.
        """
        settings = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        if not any("SequenceClassification" in name for name in settings.get("architectures") or []):
            raise ConfigError(
                f"reward model {self._folder}",
                found=f"architectures {settings.get('architectures')}",
                needed="a sequence-classification model with one label",
                action="Train it with a reward stage, or name another folder.",
            )
        self._normaliser = ScoreNormaliser.read(self._folder)
        return load_scalar(self._config)

    @observed
    def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """Returns, per group, one score per sibling; a number that is not finite is a missing score with its error.

        Raises:
            RolloutsLostError: Groups went away with their node.
        """
        found = frozen_scores(self._model, self._fetch(groups), max_tokens=self._max_tokens, progress=self.progress)
        return [tuple(self._to_score(value) for value in values) for values in found]

    def _to_score(self, value: float) -> Score:
        if not math.isfinite(value):
            return Score(None, error=f"the reward model gave {value}")
        return Score((value - self._normaliser.mean) / self._normaliser.std, components={"reward_model_raw": value})
