"""What can be refused before anything starts: data files, constitutions, models and their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig, Stage, learners_of, roles_of
from cluster.stages.evaluate import EvaluateStage
from cluster.stages.feedback import FeedbackStage
from cluster.stages.offline import RewardStage, SupervisedStage
from cluster.stages.online import OnlineStage
from cluster.tensor_parallel import check_heads
from rlhf.data.prompts import load_prompts
from rlhf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rlhf.feedback.constitution import Constitution
    from rlhf.types import Prompt


@dataclass(frozen=True)
class CheckedInputs:
    """What the checks have read anyway.

    Attributes:
        prompts: By purpose: ``train``, ``validation``, ``evaluation``.
        files: Data files by config key, and the fingerprints of the constitutions, which cover templates and includes.
        model: The start model's local folder.
    """

    prompts: dict[str, list[Prompt]]
    files: dict[str, Path | str]
    model: Path


def check_inputs(config: RunConfig) -> CheckedInputs:
    """Reads all data with the tokenizer of the model that learns from it, every constitution, and finds all models.

    Raises:
        ConfigError: A model or constitution cannot be used, or not as the stages would use it.
        DataError: A data file cannot be used; names file and line.
        PlacementError: A model cannot be cut into as many pieces as an engine has GPUs.
    """
    from rlhf.data.formats import read_rows
    from rlhf.models.load import load_tokenizer

    constitutions = _load_constitutions(config)
    sections = {
        name: section
        for name in ("train", "validation", "evaluation")
        if (section := getattr(config.data, name)) is not None
    }
    files = {f"data.{name}": Path(section.path) for name, section in sections.items()}
    for stage in config.stages:
        if isinstance(stage, FeedbackStage | SupervisedStage) and stage.data is not None:
            files[f"stages.{stage.name}"] = Path(stage.data.path)
    for path in files.values():
        read_rows(str(path))  # the file's own faults come before the model is looked for
    folders = _resolve_models(config)
    model = folders["model"]
    _check_engines(config, folders)
    _check_models(config, folders)
    _check_judge(config, constitutions, folders)
    tokenizer = load_tokenizer(str(model))
    _check_vocabularies(config, tokenizer, folders)
    prompts = {name: load_prompts(section, tokenizer, config.max_prompt_tokens) for name, section in sections.items()}
    _check_stage_data(config, tokenizer, folders)
    evaluated: set[str] = {stage.split for stage in config.stages if isinstance(stage, EvaluateStage)}
    for name, purposes in {"training": {"train", "validation"}, "evaluation": evaluated}.items():
        for purpose in sorted(purposes) if name in constitutions else ():
            for prompt in prompts.get(purpose, []):
                constitutions[name].sign_of(prompt)
    for stage in config.stages:
        _check_judging(stage, constitutions)
        _check_grading(config, stage, prompts)
    told = {f"constitutions.{name}": constitution.fingerprint for name, constitution in constitutions.items()}
    return CheckedInputs(prompts, files | told, model)


def _load_constitutions(config: RunConfig) -> dict[str, Constitution]:
    from rlhf.feedback.constitution import load_constitution

    paths = {name: getattr(config.constitutions, name) for name in ("training", "evaluation")}
    return {name: load_constitution(path) for name, path in paths.items() if path is not None}


# Models


def named_models(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every model that the recipe names and the run loads, by config key; not what an earlier stage writes."""
    yield "model", config.model
    judged = any("judge" in roles_of(config, stage) for stage in config.stages)
    if judged and config.roles.judge.endpoint is None and config.roles.judge.model is not None:
        yield "roles.judge.model", config.roles.judge.model
    written: set[Path] = set()
    for index, stage in enumerate(config.stages):
        for part, learner in learners_of(stage).items():
            reference = learner.model.path
            if reference and Path(reference).expanduser().resolve() not in written:
                yield f"stages.{index}.{part}.model.path", reference
        written |= {config.directory.resolve() / folder for folder in _written_by(stage)}


def _check_models(config: RunConfig, folders: Mapping[str, Path]) -> None:
    """Every model can be trained as its stage says, and the start model can be the reference.

    What an earlier stage writes has the architecture of the model that it started from.
    """
    from rlhf.models.load import check_model
    from rlhf.models.settings import ModelConfig

    start = policy = folders["model"]
    reward_model: Path | None = None
    written: dict[Path, Path] = {}
    if any("reference" in roles_of(config, stage) for stage in config.stages):
        check_model(ModelConfig(path=str(start)), "language_model")
    for index, stage in enumerate(config.stages):
        for part, learner in learners_of(stage).items():
            is_reward = isinstance(stage, RewardStage)
            default = start if is_reward else policy if part == "learner" else reward_model or policy
            own = Path(learner.model.path).expanduser().resolve()
            folder = folders.get(f"stages.{index}.{part}.model.path") or written.get(own, default)
            model = learner.model.model_copy(update={"path": str(folder)})
            try:
                check_model(model, "scalar" if is_reward or part == "critic" else "language_model")
            except ConfigError as error:
                raise ConfigError(
                    f"stages.{index}.{part}.{error.where}",
                    found=error.found,
                    needed=error.needed,
                    action=error.action,
                ) from error
            longest = _context_of(folder)
            if longest is not None and config.max_sequence_tokens > longest:
                raise ConfigError(
                    "max_sequence_tokens",
                    found=f"{config.max_sequence_tokens}",
                    needed=f"at most {longest}, the context of {folder}, which stage {stage.name} trains",
                    action="Lower it.",
                )
            if is_reward:
                reward_model = folder
            elif part == "learner":
                policy = folder
            if part == "learner":
                written |= {config.directory.resolve() / name: folder for name in _written_by(stage)}


def _check_vocabularies(config: RunConfig, tokenizer: Any, folders: Mapping[str, Path]) -> None:
    """Token ids go from stage to stage: what reads them knows all that the start model has, a policy no others."""
    from rlhf.models.load import load_tokenizer

    start = tokenizer.get_vocab()
    for index, stage in enumerate(config.stages):
        for part in learners_of(stage):
            key = f"stages.{index}.{part}.model.path"
            if key not in folders:
                continue
            own = load_tokenizer(str(folders[key])).get_vocab()
            only_reads = isinstance(stage, RewardStage) or part == "critic"
            if own != start and not (only_reads and start.items() <= own.items()):
                raise ConfigError(
                    key,
                    found=f"{folders[key]}, whose tokenizer has another vocabulary",
                    needed=f"that of the start model, {folders['model']}",
                    action="Choose a model of the same family, or start the run from this one (`model`).",
                )


def _written_by(stage: Stage) -> tuple[str, ...]:
    """Folders of the run directory that hold a model once the stage is done."""
    if isinstance(stage, FeedbackStage | EvaluateStage):
        return ()
    if isinstance(stage, RewardStage):
        return ("reward_model",)
    return (f"{stage.name}/policy",)


def _resolve_models(config: RunConfig) -> dict[str, Path]:
    """The local folder of every named model by config key."""
    from rlhf.models.resolve import resolve_model

    found: dict[str, Path] = {}
    for key, reference in named_models(config):
        try:
            found[key] = resolve_model(reference)
        except ConfigError as error:
            raise ConfigError(
                key, found=f"{error.where}: {error.found}", needed=error.needed, action=error.action
            ) from None
    return found


def _check_engines(config: RunConfig, folders: Mapping[str, Path]) -> None:
    """An engine has heads for all its GPUs, and no longer a context than its model's, where that is a plain number."""
    roles = config.roles
    engines = {"generation": (roles.generation.engine, folders["model"])}
    if roles.judge.endpoint is None:
        engines["judge"] = (roles.judge.engine, folders.get("roles.judge.model", folders["model"]))
    used = set().union(*(roles_of(config, stage) for stage in config.stages))
    for role, (engine, folder) in engines.items():
        if role not in used:
            continue
        check_heads(role, engine.tensor_parallel_size, folder)
        if not config.resources(role).gpus:
            engine.check_cpu(f"roles.{role}.engine.")
        longest = _context_of(folder)
        if longest is not None and engine.max_model_len > longest:
            raise ConfigError(
                f"roles.{role}.engine.max_model_len",
                found=f"{engine.max_model_len}",
                needed=f"at most {longest}, the context of {folder}",
                action="Lower it, and max_sequence_tokens with it.",
            )


def _context_of(folder: Path) -> int | None:
    """The longest sequence that a model was made for, where that is a plain number."""
    from rlhf.runs.files import read_json

    settings = read_json(folder / "config.json")
    longest = settings.get("max_position_embeddings")
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    return longest if isinstance(longest, int) and scaling.get("rope_type", "default") == "default" else None


# Data and constitutions, stage by stage


def _check_stage_data(config: RunConfig, tokenizer: Any, folders: Mapping[str, Path]) -> None:
    """Reads the stages' own files as the stages will, and checks that every rank gets something of each batch."""
    from rlhf.data.groups import split_held_out
    from rlhf.data.preferences import load_people_feedback
    from rlhf.data.supervised import load_supervised
    from rlhf.loops.offline import check_batches
    from rlhf.models.load import load_tokenizer

    for index, stage in enumerate(config.stages):
        if isinstance(stage, FeedbackStage) and stage.data is not None:
            load_people_feedback(stage.data, tokenizer, config.max_sequence_tokens)
        if isinstance(stage, SupervisedStage) and stage.data is not None:
            own = folders.get(f"stages.{index}.learner.model.path")
            reader = tokenizer if own is None else load_tokenizer(str(own))
            groups = load_supervised(stage.data, reader, config.max_sequence_tokens)
            if len(groups) < 2:
                raise DataError(
                    stage.data.path, found="1 record", needed="at least 2 to learn from", action="Add records."
                )
            train, _ = split_held_out(groups, stage.held_out_fraction, seed=config.seed)
            check_batches(len(train), stage.loop, config.roles.learner.ranks, f"stages.{index}.loop")


def _check_judge(config: RunConfig, constitutions: Mapping[str, Constitution], folders: Mapping[str, Path]) -> None:
    """The judge can answer with the labels, and a service's key is there.

    The key is looked for in the environment of a private cluster's workers, which is this process's own.
    """
    from rlhf.feedback.labels import check_chat_labels, label_tokens
    from rlhf.models.load import load_tokenizer

    if not any("judge" in roles_of(config, stage) for stage in config.stages):
        return
    endpoint = config.roles.judge.endpoint
    if endpoint is not None:
        if config.ray.address is None:
            endpoint.key()
        if endpoint.api == "chat":
            for name, constitution in constitutions.items():
                check_chat_labels(constitution, name=name)
        return
    tokenizer = load_tokenizer(str(folders.get("roles.judge.model", folders["model"])))
    judge = config.roles.judge.model or config.model
    for name, constitution in constitutions.items():
        label_tokens(tokenizer, constitution, name=name, judge=judge, seed=config.seed)


def _check_judging(stage: Stage, constitutions: Mapping[str, Constitution]) -> None:
    """A pairwise judge compares siblings, so there have to be two.

    It says how one stands among them and nothing of other completions: no agreement with an outside scorer is measured
    of that, and no arm of an evaluation is held against another by it.
    """
    pairwise = {name for name, constitution in constitutions.items() if constitution.config.mode == "pairwise"}
    found = ""
    if isinstance(stage, FeedbackStage) and stage.measure_agreement and "training" in pairwise:
        found, action = "measure_agreement with a pairwise constitution", "Set measure_agreement: false."
    if isinstance(stage, EvaluateStage) and "evaluation" in pairwise:
        found = "constitutions.evaluation in mode pairwise, whose numbers of one arm say nothing of another"
        action = "Name a pointwise constitution, or leave constitutions.evaluation unset."
    if isinstance(stage, OnlineStage) and "training" in pairwise and any(p.source == "judge" for p in stage.rewards):
        if stage.loop.num_samples < 2:
            found, action = "loop.num_samples: 1 with a pairwise constitution", "Raise loop.num_samples to 2 or more."
        elif stage.loop.evaluate_every:
            found = "loop.evaluate_every, whose one sample a prompt a pairwise constitution cannot judge"
            action = "Set loop.evaluate_every: 0."
    if found:
        raise ConfigError(f"stage {stage.name}", found=found, needed="a pointwise constitution", action=action)


def _check_grading(config: RunConfig, stage: Stage, prompts: Mapping[str, list[Prompt]]) -> None:
    """Columns and signs that a stage grades by are there, and so is the independent scorer where it is used."""
    from rlhf.evaluation.independent import VaderScorer
    from rlhf.evaluation.instruments import choose_instruments, require_signs

    where = f"stage {stage.name}"
    if isinstance(stage, EvaluateStage):
        judged = config.constitutions.evaluation is not None
        rewarded = any(isinstance(other, RewardStage) for other in config.stages)
        chosen = choose_instruments(
            prompts[stage.split], stage.report_card, judged=judged, has_reward_model=rewarded, where=where
        )
        if "sentiment" in chosen:
            VaderScorer()
    elif isinstance(stage, FeedbackStage) and stage.measure_agreement:
        require_signs(prompts["train"][: stage.num_prompts or None], config.report_card, where)
        VaderScorer()
