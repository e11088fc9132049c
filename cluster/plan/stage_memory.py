"""Memory of a whole stage: which roles lie on a device together, and the phase in which there is most on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from actors.parts import ENGINE_PARTS
from cluster.config import RunConfig, Stage, learners_of, roles_of
from cluster.plan.activations import Rows
from cluster.plan.devices import GIB
from cluster.plan.inference_memory import engine_memory, frozen_memory
from cluster.plan.learner_memory import Training, learner_parts
from cluster.plan.parts import PROCESS, RESIDENT, Kind, Part, RoleMemory
from cluster.plan.shape import ModelShape, find_shape
from cluster.sharing import PARTS, PHASES, sharing_roles
from cluster.stages.feedback import FeedbackStage
from cluster.stages.offline import PreferenceStage, RewardStage, SupervisedStage
from cluster.stages.online import OnlineStage
from cluster.topology import SMALL_ROLES

if TYPE_CHECKING:
    from rlhf.objectives.base import Head

STAYING = frozenset({"generation", "judge", "scorer", "reference"})
"""Fleets that stay from stage to stage while there is room."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of a recipe's models.

    Attributes:
        start: Of the start model.
        others: Of other models, by reference.
        missing: References that are not at hand.
    """

    start: ModelShape | None
    others: Mapping[str, ModelShape] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def of(self, reference: str | None) -> ModelShape | None:
        """The shape of a reference, or of the start model where there is none.

        A folder that an earlier stage of the run writes has the start model's shape.
        """
        return self.others.get(reference or "", self.start) if reference not in self.missing else None


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """What lies on one device in one phase of a stage.

    Attributes:
        stage: Its name.
        roles: Whose device it is.
        phase: ``work``, or the phase of roles that take turns.
        parts: Role and part.
        is_shown: Whether a table shows it; the start of an engine is only checked.
    """

    stage: str
    roles: tuple[str, ...]
    phase: str
    parts: tuple[tuple[str, Part], ...]
    is_shown: bool = True

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(part.size for _, part in self.parts)

    def sums(self) -> dict[str, float]:
        """Bytes by the parts' names."""
        sums: dict[str, float] = {}
        for _, part in self.parts:
            sums[part.name] = sums.get(part.name, 0.0) + part.size
        return sums


def shapes_of(config: RunConfig, folder: Path | None = None) -> Shapes:
    """The shapes of all models that a recipe names, as far as they are at hand.

    Raises:
        ConfigError: A model is at hand, and of another kind than can be planned.
    """
    named = {config.model: True}
    if config.roles.judge.endpoint is None and config.roles.judge.model is not None:
        named[config.roles.judge.model] = True
    for stage in config.stages:
        for learner in learners_of(stage).values():
            # A folder of this run comes to be while it goes on, with the shape of the model that it starts from.
            if learner.model.path and not Path(learner.model.path).is_relative_to(config.directory.resolve()):
                named[learner.model.path] = True
    found = {reference: find_shape(reference, folder) for reference in named}
    missing = tuple(reference for reference, shape in found.items() if shape is None)
    known = {reference: shape for reference, shape in found.items() if shape is not None}
    return Shapes(known.get(config.model), known, missing)


def role_memory(
    config: RunConfig, stage: Stage, role: str, shapes: Shapes, device_gib: float | None
) -> RoleMemory | None:
    """What one actor of a role holds in a stage; None for roles without a model here, and for unknown models.

    Raises:
        PlacementError: An engine's cache has no room for one sequence.
    """
    if role in SMALL_ROLES or (role == "judge" and config.roles.judge.endpoint is not None):
        return None
    on_gpu = config.resources(role).gpus > 0
    bucket = config.roles.generation.bucket_mib * 2**20
    shape = shape_of(config, stage, role, shapes)
    if shape is None:
        return None
    if PARTS[role] == ENGINE_PARTS:
        engine = config.roles.generation.engine if role == "generation" else config.roles.judge.engine
        device = device_gib * GIB if on_gpu and device_gib is not None else None
        return engine_memory(
            role, shape, engine, device_bytes=device, bucket_bytes=bucket if role == "generation" else 0.0
        )
    if role in ("scorer", "reference"):
        section = config.roles.scorer if role == "scorer" else config.roles.reference
        head: Head = "scalar" if role == "scorer" else "language_model"
        most = section.max_tokens_per_batch
        return frozen_memory(role, shape, dtype=section.dtype, max_tokens=most, head=head, on_gpu=on_gpu)
    training = Training(
        shape,
        "scalar" if role == "critic" or isinstance(stage, RewardStage) else "language_model",
        learners_of(stage)[role],
        config.plan(role).count,
        rows_of(config, stage, learners_of(stage)[role].max_tokens_per_micro_batch),
        keeps_reference=isinstance(stage, PreferenceStage),
        bucket_bytes=bucket if role == "learner" and isinstance(stage, OnlineStage) else 0.0,
    )
    return RoleMemory(role, learner_parts(training, on_gpu=on_gpu))


def shape_of(config: RunConfig, stage: Stage, role: str, shapes: Shapes) -> ModelShape | None:
    """The shape of a role's model: reward models and critics start from the reward stage's model where it names one."""
    if role == "judge":
        return shapes.of(config.roles.judge.model)
    learners = learners_of(stage)
    if role in learners and learners[role].model.path:
        return shapes.of(learners[role].model.path)
    if role in ("scorer", "critic"):
        rewards = [other.learner.model.path for other in config.stages if isinstance(other, RewardStage)]
        return shapes.of(rewards[0] if rewards else None)
    return shapes.of(None)


def rows_of(config: RunConfig, stage: Stage, limit: int) -> Rows:
    """The largest micro-batch of a learner: as many tokens as allowed, or one row where that has more.

    Prompts may be short, so that nearly every token is a completion's, with logits.
    """
    prompt, completion, siblings = config.max_prompt_tokens, config.sampling.max_tokens, 1
    if isinstance(stage, OnlineStage):
        siblings = stage.loop.num_samples
    elif isinstance(stage, RewardStage | PreferenceStage):
        drawn = [s.loop.num_samples for s in config.stages if isinstance(s, FeedbackStage) and s.source == "judge"]
        siblings = drawn[0] if drawn else 2
    elif isinstance(stage, SupervisedStage) and stage.source == "file":
        prompt, completion = 1, config.max_sequence_tokens - 1
    tokens = max(limit, prompt + siblings * completion)
    return Rows(tokens, prompt, completion, siblings, targets=tokens)


def stage_memories(config: RunConfig, stage: Stage, shapes: Shapes, device_gib: float | None) -> dict[str, RoleMemory]:
    """What one actor of each role of a stage holds; roles without a model here are left out."""
    found = {role: role_memory(config, stage, role, shapes, device_gib) for role in sorted(roles_of(config, stage))}
    return {role: memory for role, memory in found.items() if memory is not None}


def device_loads(
    config: RunConfig, stage: Stage, memories: Mapping[str, RoleMemory], staying: Mapping[str, RoleMemory]
) -> list[DeviceLoad]:
    """What each kind of GPU of a stage holds, phase by phase; roles on CPUs are left out.

    Args:
        config: The recipe.
        stage: The stage.
        memories: Of its roles.
        staying: Of fleets that earlier stages have left behind.
    """
    loads: list[DeviceLoad] = []
    for role, memory in memories.items():
        if config.resources(role).gpus >= 1:
            loads += _alone(stage, memory)
    sharing = [role for role in memories if 0 < config.resources(role).gpus < 1]
    behind = {role: memory for role, memory in staying.items() if 0 < config.resources(role).gpus < 1}
    if sharing and config.gate == "shared":
        loads += _taking_turns(stage, {role: memories[role] for role in sharing}, behind)
    elif sharing:
        loads += _side_by_side(config, stage, {role: memories[role] for role in sharing}, behind)
    return loads


def _alone(stage: Stage, memory: RoleMemory) -> Iterator[DeviceLoad]:
    phases: tuple[tuple[str, Kind], ...] = (("work", "work"), ("publish", "publish"))
    for phase, kind in phases:
        if phase == "work" or memory.on_device(frozenset({kind})):
            parts = tuple((memory.role, part) for part in memory.on_device(RESIDENT | {kind}))
            yield DeviceLoad(stage.name, (memory.role,), phase, parts)


def _taking_turns(
    stage: Stage, memories: Mapping[str, RoleMemory], behind: Mapping[str, RoleMemory]
) -> Iterator[DeviceLoad]:
    """Roles that put aside what a phase does not need; see ``cluster.sharing``."""
    for phase, needs in PHASES.items():
        if phase not in memories and not (phase == "publish" and needs.keys() <= memories.keys()):
            continue
        parts = [(role, part) for role, memory in behind.items() for part in memory.on_device(PROCESS)]
        for role, memory in memories.items():
            kinds: set[str] = {"process"} | needs.get(role, frozenset())
            kinds |= {"work"} if role == phase else {"publish"} if phase == "publish" and role in needs else set()
            parts += [(role, part) for part in memory.parts if part.kind in kinds]
        yield DeviceLoad(stage.name, tuple(memories), phase, tuple(parts))


def _side_by_side(
    config: RunConfig, stage: Stage, memories: Mapping[str, RoleMemory], behind: Mapping[str, RoleMemory]
) -> Iterator[DeviceLoad]:
    """Fractions of a GPU that nobody moves: all stays, and one role works at a time, or all with ``gate: open``."""
    free: list[tuple[float, list[str]]] = []
    every = {**memories, **behind}
    for role in every:
        share = config.resources(role).gpus
        for _ in range(config.plan(role).count):
            place = next((i for i, (left, _) in enumerate(free) if left + 1e-9 >= share), None)
            if place is None and role in behind:
                continue  # a fleet for which there is no room ends before the stage
            if place is None:
                free.append((1.0 - share, [role]))
            else:
                free[place] = (free[place][0] - share, [*free[place][1], role])
    for _, roles in free:
        resident = [(role, part) for role in roles for part in every[role].on_device(RESIDENT)]
        working = [max(every[role].size(frozenset({kind})) for kind in ("work", "publish")) for role in roles]
        most = sum(working) if config.gate == "open" else max(working)
        parts = (*resident, ("+".join(sorted(set(roles))), Part("activations", "work", most)))
        yield DeviceLoad(stage.name, tuple(roles), "work", parts)


def engine_starts(
    config: RunConfig, stage: Stage, memories: Mapping[str, RoleMemory], device: float
) -> list[DeviceLoad]:
    """What has to be free for the start of engines beside roles that share their GPU: vLLM's own condition."""
    sharing = [role for role in memories if role in sharing_roles(config.roles)]
    loads = []
    for role in sharing:
        if PARTS[role] != ENGINE_PARTS:
            continue
        share = getattr(config.roles, role).engine.gpu_memory_utilization * device
        others = [(other, part) for other in sharing if other != role for part in memories[other].on_device(PROCESS)]
        parts = ((role, Part("free at its start", "work", share)), *others)
        loads.append(DeviceLoad(stage.name, tuple(sharing), f"start of {role}", parts, is_shown=False))
    return loads


def host_bytes(config: RunConfig, memories: Mapping[str, RoleMemory], counts: Mapping[str, int]) -> dict[str, float]:
    """Memory of one node beside its GPUs, by role: roles on CPUs, offloaded optimizers, and what is put aside.

    Args:
        config: The recipe.
        memories: Of the roles that are there at the same time.
        counts: Actors of each role on the node.
    """
    aside = sharing_roles(config.roles) if config.gate == "shared" else frozenset()
    needed: dict[str, float] = {}
    for role, memory in memories.items():
        if config.resources(role).gpus == 0:
            size = sum(part.size for part in memory.parts if part.kind != "publish")
        else:
            size = memory.size(frozenset({"host"}))
            size += memory.size(frozenset({"weights", "state"})) if role in aside else 0.0
        if counts.get(role, 0) and size:
            needed[role] = counts[role] * size
    return needed
