"""How each role is built from the configuration: worker class, arguments, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.calls import await_ref
from actors.fleet import Fleet
from actors.fleet_status import note_version
from actors.roles import FleetAnnotator, FleetJudge, FleetScorer
from rlhf.evaluation.report_card import ReportCardConfig
from rlhf.loops.gate import GatedSource
from rlhf.models.resolve import resolve_model
from rlhf.protocols import PhaseGate, RewardSource
from rlhf.rewards.config import RewardPart
from rlhf.rewards.mixture import Mixture

if TYPE_CHECKING:
    from actors.gang import LearnerGang
    from actors.judge import JudgeBase
    from actors.store import Store
    from cluster.config import RunConfig
    from cluster.context import Policy, RunContext
    from cluster.stages.online import OnlineStage


async def generation_fleet(context: RunContext, policy: Policy) -> Fleet:
    """The generation fleet, serving ``policy``: replicas that hold other weights load it from its folder."""
    from actors.generation import GenerationWorker
    from actors.vllm.processes import Cores

    role = context.config.roles.generation
    kwargs = {
        "model": policy.path,
        "engine": role.engine,
        "sampling": context.config.sampling,
        "run_seed": context.config.seed,
        "store": await context.store(),
        "cores": Cores(role.resources.threads),
        "version": policy.version,
    }
    load = (policy.path, policy.version, int(role.bucket_mib * 2**20))

    async def welcome(handle: Any) -> None:
        timeout_s = role.resources.call_timeout_s
        await await_ref(handle.load_folder.remote(*load), timeout_s=timeout_s, where="generation.load_folder")

    fresh = not context.has_fleet("generation")
    replaced = ("model", "version")  # by the welcome, for replicas of an earlier driver: a run has one architecture
    fleet = await context.fleet("generation", GenerationWorker, kwargs, welcome=welcome, welcomed=replaced)
    if context.serving != policy and not fresh:
        async with context.gate.hold("publish"):
            await fleet.change_weights(welcome, "load_folder", *load)
    fleet.welcome = welcome  # a newcomer starts from what the fleet was first created with
    context.serving = policy
    note_version(fleet, policy.version)
    return fleet


async def judge_fleet(context: RunContext) -> Fleet:
    """The judge fleet with the run's constitutions."""
    paths = context.config.constitutions
    named = {"training": paths.training, "evaluation": paths.evaluation}
    given = {name: path for name, path in named.items() if path is not None}
    worker, kwargs = judge_worker(context.config, given, await context.store())
    return await context.fleet("judge", worker, kwargs)


def judge_worker(
    config: RunConfig, constitutions: Mapping[str, Path], store: Store
) -> tuple[type[JudgeBase], dict[str, Any]]:
    """The class of the configured judge and its arguments: an endpoint's client where there is one, else vLLM."""
    role = config.roles.judge
    kwargs: dict[str, Any] = {"constitutions": constitutions, "seed": config.seed, "store": store}
    if role.endpoint is not None:
        from actors.judge_openai import OpenAIJudgeWorker

        return OpenAIJudgeWorker, kwargs | {"endpoint": role.endpoint}
    from actors.judge import JudgeWorker
    from actors.vllm.processes import Cores

    return JudgeWorker, kwargs | {
        "model": resolve_model(role.model or config.model),
        "engine": role.engine,
        "cores": Cores(role.resources.threads),
        "name": role.model or config.model,
    }


async def scorer_fleet(context: RunContext) -> Fleet:
    """The reward model at inference."""
    from actors.scorer import ScorerWorker

    role = context.config.roles.scorer
    kwargs = {
        "model": context.run.reward_model,
        "store": await context.store(),
        "dtype": role.dtype,
        "threads": role.resources.threads,
        "device": "cuda" if role.resources.gpus else "cpu",
        "max_tokens_per_batch": role.max_tokens_per_batch,
    }
    return await context.fleet("scorer", ScorerWorker, kwargs)


async def reference_annotator(context: RunContext, policy: Policy) -> FleetAnnotator:
    """The frozen model at ``policy``; a fleet that holds another model is ended first."""
    from actors.reference import ReferenceWorker

    role = context.config.roles.reference
    if context.reference not in (None, policy):
        await context.release("reference")
    context.reference = policy
    kwargs = {
        "model": policy.path,
        "store": await context.store(),
        "dtype": role.dtype,
        "threads": role.resources.threads,
        "device": "cuda" if role.resources.gpus else "cpu",
        "max_tokens_per_batch": role.max_tokens_per_batch,
        "temperature": context.config.sampling.temperature,
    }
    fleet = await context.fleet("reference", ReferenceWorker, kwargs)
    return FleetAnnotator(fleet, context.timings.add_tokens)


async def evaluator(context: RunContext, config: ReportCardConfig) -> Fleet:
    """The one worker that grades completions."""
    from actors.evaluator import EvaluatorWorker

    await context.release("evaluator")
    kwargs = {
        "run_dir": context.run.root,
        "store": await context.store(),
        "config": config,
    }
    return await context.fleet("evaluator", EvaluatorWorker, kwargs)


def training_judge(context: RunContext, fleet: Fleet) -> FleetJudge:
    """The judge that is learned from; in a null arm its verdicts are dealt out at random."""
    return FleetJudge(fleet, "training", context.timings.add_tokens, shuffled=context.config.shuffle_verdicts)


async def build_rewards(context: RunContext, parts: Sequence[RewardPart], gate: PhaseGate) -> Mixture:
    """The weighted mixture of a stage's reward sources, each of which holds the gate under its own role."""
    from actors.rules import RulesWorker

    sources: list[RewardSource] = []
    for part in parts:
        meter = context.timings.add_tokens
        source: RewardSource
        if part.source == "reward_model":
            fleet = await scorer_fleet(context)
            source = FleetScorer("reward_model", fleet, meter)
        elif part.source == "judge":
            fleet = await judge_fleet(context)
            source = training_judge(context, fleet)
        else:
            kwargs = {"rules": part.rules, "store": await context.store()}
            fleet = await context.fleet("rules", RulesWorker, kwargs)
            source = FleetScorer("rules", fleet, meter)
        sources.append(GatedSource(source, gate, fleet.role))
    return Mixture(sources, parts)


def learner_gang(context: RunContext, stage: OnlineStage) -> AbstractAsyncContextManager[LearnerGang]:
    """The policy's learner, starting from the policy as it stands."""
    return context.gang(
        "learner",
        {
            "config": context.at_policy(stage.learner),
            "algorithm": stage.algorithm,
            "total_steps": stage.loop.steps,
            "temperature": context.config.sampling.temperature,
            "may_be_stale": stage.loop.max_staleness > 0,
        },
        loads=_has_checkpoint(context, stage),
    )


def critic_gang(context: RunContext, stage: OnlineStage) -> AbstractAsyncContextManager[LearnerGang]:
    """The value model's learner, starting from the reward model where there is one."""
    assert stage.critic is not None, "checked with the configuration"
    has_reward_model = (context.run.reward_model / "config.json").is_file()
    start = context.run.reward_model if has_reward_model else context.policy.path
    return context.gang(
        "critic",
        {
            "config": context.at(stage.critic, start),
            "algorithm": stage.algorithm,
            "total_steps": stage.loop.steps,
            "temperature": context.config.sampling.temperature,
            "is_critic": True,
        },
        loads=_has_checkpoint(context, stage),
    )


def _has_checkpoint(context: RunContext, stage: OnlineStage) -> bool:
    """Whether the stage resumes, and its learners load what they were then."""
    from rlhf.runs import checkpoint

    return bool(checkpoint.steps(context.config.checkpoints.storage(context.run, stage.name)))
