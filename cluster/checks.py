"""What can be refused before anything starts: data files, constitutions, models and their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import RunConfig
from cluster.stages.feedback import FeedbackStage
from cluster.stages.offline import SupervisedStage
from rlhf.data.prompts import load_prompts

if TYPE_CHECKING:
    from rlhf.types import Prompt


@dataclass(frozen=True)
class CheckedInputs:
    """What the checks have read anyway.

    Attributes:
        prompts: By purpose: ``train``, ``validation``, ``evaluation``.
        files: Data files and constitutions by config key, for the run's fingerprints.
        model: The start model's local folder.
    """

    prompts: dict[str, list[Prompt]]
    files: dict[str, Path]
    model: Path


def check_inputs(config: RunConfig) -> CheckedInputs:
    """Reads all data with the start model's tokenizer and every constitution.

    Raises:
        ConfigError: A model or constitution cannot be used.
        DataError: A data file cannot be used; names file and line.
    """
    from rlhf.feedback.constitution import Constitution, load_constitution

    files: dict[str, Path] = {}
    constitutions: dict[str, Constitution] = {}
    for name in ("training", "evaluation"):
        path: Path | None = getattr(config.constitutions, name)
        if path is not None:
            constitutions[name] = load_constitution(path)
            files[f"constitutions.{name}"] = path
    sections = {
        name: section
        for name in ("train", "validation", "evaluation")
        if (section := getattr(config.data, name)) is not None
    }
    files |= {f"data.{name}": Path(section.path) for name, section in sections.items()}
    for stage in config.stages:
        if isinstance(stage, FeedbackStage | SupervisedStage) and stage.data is not None:
            files[f"stages.{stage.name}"] = Path(stage.data.path)

    from rlhf.data.formats import read_rows
    from rlhf.data.preferences import load_people_feedback
    from rlhf.data.supervised import load_supervised
    from rlhf.models.load import load_tokenizer
    from rlhf.models.resolve import resolve_model

    for key, path in files.items():
        if key.startswith(("data.", "stages.")):
            read_rows(str(path))  # the file's own faults come before the model is looked for
    model = resolve_model(config.model)
    tokenizer = load_tokenizer(str(model))
    prompts = {name: load_prompts(section, tokenizer, config.max_prompt_tokens) for name, section in sections.items()}
    for stage in config.stages:
        if isinstance(stage, FeedbackStage) and stage.data is not None:
            load_people_feedback(stage.data, tokenizer, config.max_sequence_tokens)
        if isinstance(stage, SupervisedStage) and stage.data is not None:
            load_supervised(stage.data, tokenizer, config.max_sequence_tokens)
    for name, purposes in {"training": ("train", "validation"), "evaluation": ("evaluation",)}.items():
        for purpose in purposes if name in constitutions else ():
            for prompt in prompts.get(purpose, []):
                constitutions[name].sign_of(prompt)
    return CheckedInputs(prompts, files, model)
