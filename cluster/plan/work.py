"""How many tokens and operations a stage is, from the recipe alone. Lengths are the longest that it allows.

Products of N numbers with one token cost 2 N operations forwards and 4 N backwards (Kaplan et al., arXiv:2001.08361,
section 2.1; "6 N D"), attention 4 operations a layer, query number and token seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.settings import LearnerConfig
from cluster.config import RunConfig, Stage
from cluster.plan.learner_memory import trained_of
from cluster.plan.shape import ModelShape
from cluster.stages.evaluate import EvaluateStage
from cluster.stages.feedback import FeedbackStage
from cluster.stages.offline import SupervisedStage
from cluster.stages.online import OnlineStage
from rlhf.errors import ConfigError

BYTES_PER_TOKEN = 4.0
"""Bytes of a data file for one token, where a supervised stage's file is at hand."""
MOST_BYTES_READ = 256 << 20
"""Larger data files are not counted line by line; their rows follow from the first part."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What a stage goes through.

    Attributes:
        prompts: Groups, over all steps or epochs.
        siblings: Completions of each.
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.
        passes: Times that a learner trains on each.
    """

    prompts: float
    siblings: int
    prompt: float
    completion: float
    passes: float = 1.0

    @property
    def completions(self) -> float:
        """All completions."""
        return self.prompts * self.siblings

    @property
    def row_tokens(self) -> float:
        """Tokens of all rows, in which siblings share their prompt."""
        return self.prompts * (self.prompt + self.siblings * self.completion)

    @property
    def context(self) -> float:
        """Tokens that a token sees, on average."""
        return (self.prompt + self.completion) / 2


def samples_of(config: RunConfig, stage: Stage, rows: int | None) -> Samples | None:
    """What a stage goes through; None where its data are not at hand and ``rows`` does not say how many there are."""
    prompt, completion = float(config.max_prompt_tokens), float(config.sampling.max_tokens)
    match stage:
        case OnlineStage():
            drawn_for = stage.loop.steps * stage.loop.prompts_per_step
            return Samples(drawn_for, stage.loop.num_samples, prompt, completion, stage.algorithm.num_epochs)
        case EvaluateStage():
            prompts = _prompts_in(config, stage.split, rows)
            num = 2 * stage.num_samples  # before and after
            return None if prompts is None else Samples(prompts, num, prompt, completion)
        case FeedbackStage():
            labelled = stage.num_prompts or _prompts_in(config, "train", rows)
            if stage.source == "file":
                return Samples(0, 2, prompt, completion)
            return None if labelled is None else Samples(labelled, stage.loop.num_samples, prompt, completion)
        case SupervisedStage() if stage.data is not None:
            return _records(config, stage, rows)
        case _:
            feedback = next((s for s in config.stages if isinstance(s, FeedbackStage)), None)
            drawn = feedback is not None and feedback.source == "judge"
            groups = (feedback.num_prompts if drawn and feedback else 0) or _prompts_in(config, "train", rows)
            siblings = feedback.loop.num_samples if drawn and feedback else 2
            siblings = 1 if isinstance(stage, SupervisedStage) else siblings
            return None if groups is None else Samples(groups, siblings, prompt, completion, stage.loop.epochs)


def _records(config: RunConfig, stage: SupervisedStage, rows: int | None) -> Samples | None:
    """Records of a file: as many tokens as its bytes say, or half of the longest where only their number is known."""
    assert stage.data is not None
    counted = _lines(Path(stage.data.path))
    if counted is None and rows is None:
        return None
    records, tokens = counted or (float(rows or 0), config.max_sequence_tokens / 2)
    length = min(tokens, float(config.max_sequence_tokens))
    return Samples(records, 1, 0.0, length, stage.loop.epochs)


def _prompts_in(config: RunConfig, split: str, rows: int | None) -> float | None:
    section = getattr(config.data, split)
    if section is None:
        return rows
    counted = _lines(Path(section.path))
    found = rows if counted is None else counted[0]
    return found if found is None or section.limit is None else min(found, section.limit)


def _lines(path: Path) -> tuple[float, float] | None:
    """Lines of a text file and the mean of their tokens; None where it is not at hand or of another kind."""
    if path.suffix not in (".jsonl", ".json", ".csv", ".txt") or not path.is_file():
        return None
    size = path.stat().st_size
    with path.open("rb") as handle:
        seen = handle.read(MOST_BYTES_READ)
    lines = max(1, seen.count(b"\n"))
    return lines * max(1.0, size / len(seen) if seen else 1.0), len(seen) / lines / BYTES_PER_TOKEN


def questions_of(config: RunConfig, stage: Stage, samples: Samples) -> float:
    """What a judge is asked: once for each completion, or in both orders for each pair of siblings.

    Pairs are counted where the constitution is not at hand.
    """
    from rlhf.feedback.constitution import load_constitution

    path = config.constitutions.evaluation if isinstance(stage, EvaluateStage) else config.constitutions.training
    try:
        pairs = path is None or load_constitution(path).config.mode == "pairwise"
    except ConfigError:
        pairs = True
    return samples.completions * (samples.siblings - 1 if pairs else 1)


def forward_operations(shape: ModelShape, tokens: float, context: float) -> float:
    """Operations of one forward pass over ``tokens`` that see ``context`` tokens each, on average."""
    return 2.0 * tokens * shape.language_parameters + _attention_operations(shape, tokens, context)


def _attention_operations(shape: ModelShape, tokens: float, context: float) -> float:
    """Products of queries with keys and of weights with values, in all layers."""
    return 4.0 * tokens * shape.layers * shape.query_width * context


def training_operations(shape: ModelShape, learner: LearnerConfig, tokens: float, context: float) -> float:
    """Operations of forward and backward passes.

    Backwards, a layer costs its forward products for the gradient of its input, as many for that of its weights where
    they train, and twice its attention. Layers that are computed again cost one more forward pass.
    """
    trained = trained_of(shape, learner.model, "language_model")
    depth = trained.layers / shape.layers
    own = min(1.0, trained.numbers / shape.language_parameters)
    forward = forward_operations(shape, tokens, context)
    products = 2.0 * tokens * shape.language_parameters
    backward = depth * (products + 2.0 * _attention_operations(shape, tokens, context)) + own * products
    return forward + backward + forward * depth * learner.model.gradient_checkpointing
