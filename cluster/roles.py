"""Configuration of the roles: how many, where, on what model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.settings import EndpointConfig
from actors.vllm.config import EngineConfig
from cluster.autoscale import AutoscaleConfig
from cluster.tensor_parallel import check_gpus
from cluster.topology import Resources, RolePlan
from rlhf.config import StrictModel


class GenerationRole(StrictModel):
    """The vLLM replicas that draw completions."""

    replicas: int = Field(default=1, ge=1)
    """Replicas at the start; ``rlhf scale`` changes them while the run goes on."""
    autoscale: AutoscaleConfig | None = None
    """Changes the number of replicas with the queue; unset: only ``rlhf scale`` does."""
    resources: Resources = Resources()
    """What one replica takes."""
    engine: EngineConfig = EngineConfig()
    """vLLM's own settings."""
    bucket_mib: float = Field(default=64.0, gt=0)
    """Largest piece in which weights are published, MiB."""


class JudgeRole(StrictModel):
    """The AI-feedback model: a vLLM fleet, or any OpenAI-compatible endpoint."""

    replicas: int = Field(default=1, ge=1)
    """Replicas at the start."""
    autoscale: AutoscaleConfig | None = None
    """Changes the number of replicas with the queue; unset: only ``rlhf scale`` does."""
    resources: Resources = Resources()
    """What one replica takes."""
    model: str | None = None
    """Model that judges; unset: the run's start model, which then judges its own kind."""
    engine: EngineConfig = EngineConfig()
    """vLLM's own settings; not used with an endpoint."""
    endpoint: EndpointConfig | None = None
    """An OpenAI-compatible service that judges instead."""


class FrozenRole(StrictModel):
    """A model that only reads: the reward model at inference, or the one that the KL term is measured from."""

    replicas: int = Field(default=1, ge=1)
    """Replicas at the start."""
    autoscale: AutoscaleConfig | None = None
    """Changes the number of replicas with the queue; unset: only ``rlhf scale`` does."""
    resources: Resources = Resources()
    """What one replica takes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass."""
    max_tokens_per_batch: int = Field(default=8192, ge=1)
    """Padded tokens of one forward pass."""


class LearnerRole(StrictModel):
    """The DeepSpeed ranks of one learner; offline stages start as many under Ray Train."""

    ranks: int = Field(default=1, ge=1)
    """Ranks of the gang."""
    resources: Resources = Resources()
    """What one rank takes."""


class Roles(StrictModel):
    """All roles of a run. A role that no stage needs is not started."""

    generation: GenerationRole = GenerationRole()
    """Draws completions."""
    judge: JudgeRole = JudgeRole()
    """Gives verdicts."""
    scorer: FrozenRole = FrozenRole()
    """Scores with the trained reward model."""
    reference: FrozenRole = FrozenRole()
    """Gives the log-probs of the frozen model where the learner cannot (full fine-tuning)."""
    learner: LearnerRole = LearnerRole()
    """Trains the policy, and every offline stage."""
    critic: LearnerRole = LearnerRole()
    """Trains the value model (PPO)."""

    def plan(self, role: str) -> RolePlan:
        """The bundles of one role.

        Raises:
            PlacementError: An engine is cut into more or fewer pieces than its replica has GPUs.
        """
        section = getattr(self, role)
        if isinstance(section, GenerationRole) or (isinstance(section, JudgeRole) and section.endpoint is None):
            check_gpus(role, section.engine.tensor_parallel_size, section.resources.gpus)
        count = section.ranks if isinstance(section, LearnerRole) else section.replicas
        resources = section.resources
        return RolePlan(role, count, resources.cpus, resources.gpus, resources.strategy, resources.labels)
