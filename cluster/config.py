"""The root of the configuration: what one recipe file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from actors.settings import LearnerConfig
from cluster.roles import Roles
from cluster.sharing import check_sharing
from cluster.stages.evaluate import EvaluateStage
from cluster.stages.feedback import FeedbackStage
from cluster.stages.offline import PreferenceStage, RewardStage, SupervisedStage
from cluster.stages.online import OnlineStage
from cluster.topology import SMALL_ROLES, Resources, RolePlan
from rlhf.config import StrictModel, apply_overrides, load_file, validate
from rlhf.data.prompts import PromptDataConfig
from rlhf.evaluation.criteria import CriteriaConfig
from rlhf.evaluation.report_card import ReportCardConfig
from rlhf.models.resolve import anchor_model
from rlhf.runs.checkpoint_config import CheckpointConfig
from rlhf.runs.names import NOT_STAGES, RUN_FOLDERS, is_stage_name, validation_stage
from rlhf.sampling import SamplingConfig

Stage = Annotated[
    FeedbackStage | RewardStage | SupervisedStage | PreferenceStage | OnlineStage | EvaluateStage,
    Field(discriminator="kind"),
]


class DataConfig(StrictModel):
    """The prompts, by what they are for. No prompt of ``evaluation`` plays any part in training."""

    train: PromptDataConfig | None = None
    """Answered, judged and learned from."""
    validation: PromptDataConfig | None = None
    """Sampled while training to choose the best checkpoint."""
    evaluation: PromptDataConfig | None = None
    """Sampled before and after training, and nowhere else."""


class ConstitutionPaths(StrictModel):
    """The judge's constitutions."""

    training: Path | None = None
    """Gives the verdicts that are learned from."""
    evaluation: Path | None = None
    """Another wording, for the evaluation only, in mode ``pointwise``; unset: the evaluation has no judge."""


class RayConfig(StrictModel):
    """The Ray cluster."""

    address: str | None = None
    """Cluster to join, for example ``auto``; unset starts a private one on this machine."""
    num_cpus: float | None = None
    """CPUs that a private cluster offers; unset: the machine's cores."""
    object_store_gib: float | None = Field(default=1.0, gt=0)
    """Shared memory that a private cluster keeps for objects, GiB."""
    orphan_timeout_s: float = Field(default=600.0, ge=0)
    """On a cluster that is joined: how long the run's actors outlive a driver that was lost, for another one to take
    them over; then they are ended. 0: nothing outlives the driver. A private cluster always ends with it."""


class RunConfig(StrictModel):
    """One recipe."""

    name: str = Field(min_length=1)
    """Names the recipe in the record."""
    seed: int = 0
    """Seed of everything random."""
    run_dir: Path | None = None
    """Where the run is kept, from where the command is run; unset: ``runs/NAME``."""
    model: str
    """The model to start from: a folder (from the recipe's own, as all paths in it), a hub id, or ``package:NAME`` for
    a GGUF file in an installed package."""
    max_sequence_tokens: int = Field(default=1024, ge=8)
    """Longest prompt and completion together; longer prompts are refused with their line."""
    sampling: SamplingConfig = SamplingConfig()
    """How the policy draws, in every stage."""
    data: DataConfig = DataConfig()
    """Prompts."""
    constitutions: ConstitutionPaths = ConstitutionPaths()
    """What the judge is told."""
    shuffle_verdicts: bool = False
    """A null arm: deals what the judge says of a prompt's siblings out among them at random, in the feedback and in the
    reward. What is learned from it must not improve anything."""
    roles: Roles = Roles()
    """How many of each role, where, with what."""
    recorder: Resources = Resources(cpus=0.1)
    """What the recorder, the evaluator and the worker of the rules take, each."""
    gate: Literal["exclusive", "shared", "open"] = "exclusive"
    """``exclusive``: one role computes at a time, with all cores. ``shared``: roles with a fraction of a GPU take turns
    in the memory of that one GPU; what a phase does not need waits in host memory. ``open``: every role has devices of
    its own."""
    stages: list[Stage] = Field(min_length=1)
    """What is done, in order."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """Where checkpoints go, and how they are written."""
    criteria: CriteriaConfig | None = None
    """Bars that the evaluation is held against; they are reported and do not fail the run."""
    ray: RayConfig = RayConfig()
    """The Ray cluster."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        _check_names(self.stages)
        if self.sampling.max_tokens >= self.max_sequence_tokens:
            raise ValueError(f"max_sequence_tokens above sampling.max_tokens ({self.sampling.max_tokens})")
        generates = any("generation" in roles_of(self, stage) for stage in self.stages)
        if generates and self.max_sequence_tokens > self.roles.generation.engine.max_model_len:
            raise ValueError("roles.generation.engine.max_model_len at least max_sequence_tokens")
        for stage in self.stages:
            _check_stage(self, stage)
            _check_batch(self, stage)
        _check_order(self.stages)
        if self.gate == "shared":
            check_sharing(self.roles, {role for stage in self.stages for role in roles_of(self, stage)})
        return self

    @property
    def directory(self) -> Path:
        """The run directory."""
        return (self.run_dir or Path("runs") / self.name).expanduser()

    @property
    def report_card(self) -> ReportCardConfig:
        """What columns and signs mean, for measures outside an evaluation: as the first evaluate stage says."""
        return next(
            (stage.report_card for stage in self.stages if isinstance(stage, EvaluateStage)), ReportCardConfig()
        )

    def count(self, role: str) -> int:
        """Actors of a role at the start."""
        return self.plan(role).count

    def plan(self, role: str, count: int | None = None) -> RolePlan:
        """The bundles of a role; ``count`` takes the place of the configured number of actors."""
        if role in SMALL_ROLES:
            small = self.recorder
            own = RolePlan(role, 1, small.cpus, small.gpus, small.strategy, small.labels)
        else:
            own = self.roles.plan(role)
        return own if count is None else dataclasses.replace(own, count=count)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for a whole completion."""
        return self.max_sequence_tokens - self.sampling.max_tokens

    def resources(self, role: str) -> Resources:
        """What one actor of a role takes."""
        if role in SMALL_ROLES:
            return self.recorder
        resources: Resources = getattr(self.roles, role).resources
        return resources


def roles_of(config: RunConfig, stage: Stage) -> set[str]:
    """The roles that a stage places; an offline stage's learner ranks are placed by Ray Train."""
    match stage:
        case FeedbackStage():
            if stage.source == "file":
                return {"recorder"}
            return {"recorder", "generation", "judge"} | ({"evaluator"} if stage.measure_agreement else set())
        case OnlineStage():
            sources = {"reward_model": "scorer", "judge": "judge", "rules": "rules"}
            roles = {"recorder", "generation", "learner"} | {sources[part.source] for part in stage.rewards}
            penalised = max(stage.algorithm.policy.kl.coefficient, stage.algorithm.reward_kl.coefficient) > 0
            roles |= {"critic"} if stage.algorithm.name == "ppo" else set()
            return roles | ({"reference"} if penalised and stage.learner.model.adapter is None else set())
        case EvaluateStage():
            rewarded = any(isinstance(other, RewardStage) for other in config.stages)
            roles = {"recorder", "generation", "reference", "evaluator"} | ({"scorer"} if rewarded else set())
            return roles | ({"judge"} if config.constitutions.evaluation is not None else set())
        case _:
            return {"learner"}


def learners_of(stage: Stage) -> dict[str, LearnerConfig]:
    """What a stage trains, by the key of its section."""
    match stage:
        case FeedbackStage() | EvaluateStage():
            return {}
        case OnlineStage():
            return {"learner": stage.learner} | ({} if stage.critic is None else {"critic": stage.critic})
        case _:
            return {"learner": stage.learner}


def _check_names(stages: Sequence[Stage]) -> None:
    """A stage's name is part of paths, and its own folder lies in the run directory beside the run's."""
    names = [stage.name for stage in stages]
    taken = {validation_stage(stage.name): stage.name for stage in stages if isinstance(stage, OnlineStage)}
    for name in names:
        if name in taken:
            raise ValueError(f"another name for the stage {name!r}: the validations of {taken[name]!r} have it")
        if name in NOT_STAGES:
            raise ValueError(f"another name for the stage {name!r}: the timings have a heading of that name")
        if not is_stage_name(name):
            raise ValueError(f"a stage name of letters, digits, '-' and '_' instead of {name!r}")
        if name in RUN_FOLDERS:
            raise ValueError(f"another name for the stage {name!r}: the run directory has a folder of that name")
        if names.count(name) > 1:
            raise ValueError(f"two stages named {name!r}: give one of them another name")


def _check_stage(config: RunConfig, stage: Stage) -> None:
    """Combinations that cannot work, found before anything is loaded."""
    needs: dict[str, bool] = {}
    greedy = config.sampling.temperature == 0
    if isinstance(stage, FeedbackStage) and stage.source == "judge":
        needs = {"data.train": config.data.train is None, "constitutions.training": not config.constitutions.training}
        if greedy:
            raise ValueError(f"stage {stage.name}: sampling.temperature above 0, as siblings at 0 are all the same")
    if isinstance(stage, OnlineStage):
        evaluates = stage.loop.evaluate_every > 0
        judged = any(part.source == "judge" for part in stage.rewards)
        needs = {
            "data.train": config.data.train is None,
            "data.validation (for loop.evaluate_every)": evaluates and config.data.validation is None,
            "constitutions.training (for the judge's reward)": judged and not config.constitutions.training,
            "critic (the algorithm has one)": stage.algorithm.name == "ppo" and stage.critic is None,
        }
        if stage.algorithm.name in ("grpo", "rloo") and stage.loop.num_samples < 2:
            raise ValueError(f"stage {stage.name}: loop.num_samples of at least 2 for {stage.algorithm.name}")
        if stage.algorithm.name != "ppo" and stage.critic is not None:
            raise ValueError(f"stage {stage.name}: no critic, as {stage.algorithm.name} has none; or algorithm ppo")
        if stage.learner.model.path:
            needed = "no learner.model.path: the policy is what the stages before left, or else the run's model"
            raise ValueError(f"stage {stage.name}: {needed}")
        if greedy:
            raise ValueError(f"stage {stage.name}: sampling.temperature above 0, as a policy at 0 explores nothing")
        if config.sampling.top_p < 1 or config.sampling.top_k or config.sampling.min_tokens:
            needed = "sampling.top_p 1, top_k 0 and min_tokens 0, as the learner's log-probs are of all tokens"
            raise ValueError(f"stage {stage.name}: {needed}")
    if isinstance(stage, EvaluateStage):
        needs = {f"data.{stage.split}": getattr(config.data, stage.split) is None}
    missing = [key for key, is_missing in needs.items() if is_missing]
    if missing:
        raise ValueError(f"stage {stage.name} needs {missing[0]}")


def _check_batch(config: RunConfig, stage: Stage) -> None:
    """Every rank has to get something of every batch."""
    ranks = config.roles.learner.ranks
    if isinstance(stage, OnlineStage):
        parts = stage.algorithm.num_mini_batches
        for role in learners_of(stage):
            ranks = config.plan(role).count
            if stage.loop.prompts_per_step < ranks * parts:
                needed = f"roles.{role}.ranks ({ranks}) times algorithm.num_mini_batches ({parts})"
                raise ValueError(f"stage {stage.name}: loop.prompts_per_step of at least {needed}")
    elif isinstance(stage, RewardStage | SupervisedStage | PreferenceStage) and stage.loop.groups_per_step < ranks:
        raise ValueError(f"stage {stage.name}: loop.groups_per_step of at least roles.learner.ranks ({ranks})")


def _check_order(stages: Sequence[Stage]) -> None:
    """What a stage learns from has to come from a stage before it."""
    ranked = rewarded = False
    for kind in ("feedback", "reward"):  # a second one would find the first one's rankings, or replace its model
        if len(names := [stage.name for stage in stages if stage.kind == kind]) > 1:
            raise ValueError(f"one {kind} stage in a run instead of {' and '.join(names)}: use a run for each")
    for stage in stages:
        needed = ""
        if isinstance(stage, FeedbackStage):
            ranked = True
        elif _learns_from_rankings(stage) and not ranked:
            needed = "a feedback stage before it"
        elif isinstance(stage, OnlineStage) and not rewarded:
            learned = any(part.source == "reward_model" for part in stage.rewards)
            needed = "a reward stage before it, or rewards without reward_model" if learned else ""
        if needed:
            raise ValueError(f"stage {stage.name} needs {needed}")
        rewarded = rewarded or isinstance(stage, RewardStage)


def _learns_from_rankings(stage: Stage) -> bool:
    if isinstance(stage, SupervisedStage):
        return stage.source == "feedback"
    return isinstance(stage, RewardStage | PreferenceStage)


def read_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a recipe as it is written: its paths are still relative to its folder.

    Raises:
        ConfigError: The first fault, with file and key.
    """
    document = apply_overrides(load_file(path), overrides)
    document.setdefault("name", path.stem)
    return validate(RunConfig, document, str(path))


def load_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a recipe. Paths inside it, but for ``run_dir``, are relative to its folder and come out absolute.

    Raises:
        ConfigError: The first fault, with file and key.
    """
    base = path.resolve().parent
    return map_paths(
        read_run_config(path, overrides),
        file=lambda _, named: str((base / Path(named).expanduser()).resolve()),
        model=lambda _, named: anchor_model(named, base),
    )


MapPath = Callable[[str, str], str]
"""Takes a key of the recipe and what is named there, and returns what is to be named instead."""


def map_paths(config: RunConfig, *, file: MapPath, model: MapPath) -> RunConfig:
    """A recipe with other paths: ``file`` is asked for data files and constitutions, ``model`` for models."""
    data = {
        name: section.model_copy(update={"path": file(f"data.{name}.path", str(section.path))})
        for name in ("train", "validation", "evaluation")
        if (section := getattr(config.data, name)) is not None
    }
    constitutions = {
        name: Path(file(f"constitutions.{name}", str(path)))
        for name in ("training", "evaluation")
        if (path := getattr(config.constitutions, name)) is not None
    }
    judge = config.roles.judge
    if judge.model is not None:
        judge = judge.model_copy(update={"model": model("roles.judge.model", judge.model)})
    stages = [_map_stage(stage, f"stages.{index}", file, model) for index, stage in enumerate(config.stages)]
    return config.model_copy(
        update={
            "model": model("model", config.model),
            "data": config.data.model_copy(update=data),
            "stages": stages,
            "constitutions": config.constitutions.model_copy(update=constitutions),
            "roles": config.roles.model_copy(update={"judge": judge}),
        }
    )


def _map_stage(stage: Stage, key: str, file: MapPath, model: MapPath) -> Stage:
    update: dict[str, Any] = {}
    if isinstance(stage, FeedbackStage | SupervisedStage) and stage.data is not None:
        update["data"] = stage.data.model_copy(update={"path": file(f"{key}.data.path", str(stage.data.path))})
    for part, learner in learners_of(stage).items():
        if learner.model.path:
            path = model(f"{key}.{part}.model.path", learner.model.path)
            update[part] = learner.model_copy(update={"model": learner.model.model_copy(update={"path": path})})
    return stage.model_copy(update=update)
