"""What the ranks of the learner tests do: plain functions, so that spawned processes can import them.

Each returns plain numbers and arrays; the tests assert on them. Cases share processes, since importing the libraries
takes longer than all of the cases together.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.deepspeed.config import DeepSpeedConfig, OptimConfig
from actors.learner import LearnerWorker
from actors.ranks import RankInfo
from actors.settings import LearnerConfig
from actors.store import LocalStore
from rlhf.algorithms.config import GrpoConfig, PpoConfig
from rlhf.errors import DataError, NonFiniteError, RolloutsLostError, ValueLostError
from rlhf.models.settings import LoraConfig, ModelConfig
from rlhf.objectives.config import RankConfig, SupervisedConfig
from rlhf.types import Completion, GroupHandle, Prompt, Rollout, RolloutGroup, Score, TrainGroup, VersionSpan
from rlhf.weights import Bucket, bucket_tensors, verify_bucket
from tests.rlhf.models.conftest import make_groups

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=3, max_grad_norm=0.5)


def learner_config(
    model: Path | str, *, stage: int = 0, optim: OptimConfig = OPTIM, **model_fields: Any
) -> LearnerConfig:
    return LearnerConfig(
        model=ModelConfig(path=str(model), **{"dtype": "float32", **model_fields}),
        optim=optim,
        deepspeed=DeepSpeedConfig(zero_stage=stage, persistent_elements=100, collective_timeout_s=60),
        max_tokens_per_micro_batch=64,
    )


def handle_of(group: TrainGroup, scores: list[float | None], log_prob: float = -1.0) -> GroupHandle:
    prompt = Prompt(group.uid, (), tuple(int(t) for t in group.prompt_ids))
    rollouts = tuple(
        Rollout(Completion(ids, np.full(len(ids), log_prob, np.float32), "", "stop", (VersionSpan(0, 0, len(ids)),)))
        for ids in group.completion_ids
    )
    return GroupHandle(
        uid=group.uid,
        payload=RolloutGroup(prompt, rollouts),
        prompt_length=len(group.prompt_ids),
        completion_lengths=tuple(len(ids) for ids in group.completion_ids),
        weight_versions=(0, 0),
        scores=tuple(Score(value, error="" if value is not None else "no score") for value in scores),
    )


def scored_handles(num_groups: int = 6, siblings: int = 3) -> list[GroupHandle]:
    rng = np.random.default_rng(5)
    groups = make_groups(num_groups, siblings, seed=2)
    return [handle_of(group, [float(s) for s in rng.normal(size=siblings)]) for group in groups]


def weights(worker: LearnerWorker, bucket_bytes: int = 20_000) -> dict[str, np.ndarray]:
    """The whole model on rank 0, through the export; empty elsewhere."""
    found: dict[str, np.ndarray] = {}
    for index in range(len(worker.export_plan(bucket_bytes, "float32"))):
        bucket = bucket_of(worker, index)
        if bucket is not None:
            verify_bucket(bucket)
            found |= {name: tensor.numpy().copy() for name, tensor in bucket_tensors(bucket).items()}
    return found


def bucket_of(worker: LearnerWorker, index: int) -> Bucket | None:
    """A bucket of the plan on rank 0; a handle of the local store is the object itself."""
    put = worker.put_bucket(index)
    return None if put is None else put[0]


def log_probs(worker: LearnerWorker, groups: list[GroupHandle], *, reference: bool) -> list[Any]:
    """Every group's log-probs: under the current weights, or under the reference (adapter off)."""
    found = worker._fetch(groups)
    return worker._runner.reference_log_probs(found) if reference else worker._runner.log_probs(found)


def share(items: list[Any], info: RankInfo) -> list[Any]:
    return items[info.rank :: info.world_size]


def supervised_stages(info: RankInfo, model: Path, scratch: Path) -> dict[str, Any]:
    """Per ZeRO stage: two updates, skips that one rank causes, a save, and how training goes on with and without it."""
    results: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        worker = LearnerWorker(
            learner_config(model, stage=stage), LocalStore(), info, objective=SupervisedConfig(), total_steps=10
        )
        worker.start()
        groups = share(make_groups(8, 2), info)
        metrics = [worker.train_step(groups) for _ in range(2)]
        before = weights(worker)
        skipped = _skips(worker, groups, info)
        unchanged = all(np.array_equal(value, before[name]) for name, value in weights(worker).items())
        directory = scratch / f"stage{stage}"
        directory.mkdir(exist_ok=True)
        worker.barrier()
        written = worker.gather(worker.save(str(directory)))
        files = {name: entry for part in written for name, entry in part.items()}
        straight = [worker.train_step(groups) for _ in range(2)], weights(worker), torch.get_rng_state().tolist()
        worker.stop()

        resumed = LearnerWorker(
            learner_config(model, stage=stage), LocalStore(), info, objective=SupervisedConfig(), total_steps=10
        )
        resumed.start()
        assert resumed.verify(str(directory), files) == ""
        resumed.load(str(directory))
        again = [resumed.train_step(groups) for _ in range(2)], weights(resumed), torch.get_rng_state().tolist()
        resumed.stop()
        results[f"stage{stage}"] = {
            "metrics": metrics,
            "weights": before,
            "skipped": skipped,
            "unchanged": unchanged,
            "resumes": straight[0] == again[0]
            and straight[2] == again[2]
            and all(np.array_equal(straight[1][name], again[1][name]) for name in straight[1]),
            "files": sorted(path.name for path in directory.iterdir()),
        }
    return results


class _InfiniteLoss:
    """An objective whose loss is not finite."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def loss(self, *args: Any) -> Any:
        result = self.inner.loss(*args)
        return replace(result, loss=result.loss + math.inf)


def _skips(worker: LearnerWorker, groups: list[TrainGroup], info: RankInfo) -> list[dict[str, float]]:
    """A loss that is not finite on the first rank, then a gradient that is not finite on the last one."""
    objective = worker._objective
    if info.rank == 0:
        worker._objective = _InfiniteLoss(objective)
    skipped = [worker.train_step(groups)]
    worker._objective = objective
    hook = None
    if info.rank == info.world_size - 1:
        norm = worker._engine.module.get_submodule("model.model.norm")
        hook = norm.register_full_backward_hook(lambda module, grads, _: tuple(g * math.nan for g in grads))
    skipped.append(worker.train_step(groups))
    if hook is not None:
        hook.remove()
    return skipped


def export_checks(info: RankInfo, model: Path, scratch: Path) -> dict[str, Any]:
    """Bucket tensors against the exported folder's, full and LoRA, fp32 and bf16."""
    from safetensors.torch import load_file

    results: dict[str, Any] = {}
    for name, fields in {
        "full": {"dtype": "bfloat16"},
        "lora": {"dtype": "bfloat16", "adapter": LoraConfig(rank=2)},
        "fp32": {},
    }.items():
        worker = LearnerWorker(
            learner_config(model, stage=3 if name == "fp32" else 0, **fields),
            LocalStore(),
            info,
            objective=SupervisedConfig(),
            total_steps=10,
        )
        worker.start()
        worker.train_step(share(make_groups(4, 2), info))
        folder = scratch / f"export_{name}"
        worker.export(folder)
        plan = worker.export_plan(30_000)
        buckets = [bucket_of(worker, index) for index in range(len(plan))]
        worker.stop()
        if info.rank == 0:
            sent = {key: value for bucket in buckets for key, value in bucket_tensors(bucket).items()}
            saved = load_file(folder / "model.safetensors")
            results[name] = {
                "same_names": set(sent) == set(saved),
                "equal": all(
                    torch.equal(sent[key], saved[key]) and sent[key].dtype == saved[key].dtype for key in sent
                ),
                "num_buckets": len(plan),
                "names": sorted(saved),
                "folder": folder,
            }
    return results


def learned_with_adapter(info: RankInfo, model: Path, folder: Path) -> list[Bucket]:
    """Two updates of an adapter in bf16; writes the export to ``folder`` and returns the buckets of a publication."""
    fields: dict[str, Any] = {"dtype": "bfloat16", "adapter": LoraConfig(rank=2)}
    worker = LearnerWorker(
        learner_config(model, **fields), LocalStore(), info, objective=SupervisedConfig(), total_steps=10
    )
    worker.start()
    for _ in range(2):
        worker.train_step(make_groups(4, 2))
    worker.export(folder)
    buckets = [bucket_of(worker, index) for index in range(len(worker.export_plan(30_000)))]
    worker.stop()
    return [bucket for bucket in buckets if bucket is not None]


def online_cases(info: RankInfo, model: Path, scratch: Path) -> dict[str, Any]:
    """GRPO and PPO end to end on made-up rollouts."""
    return {
        "grpo": _grpo_raises_rewarded(info, model, {}),
        "grpo_lora_bf16": _grpo_raises_rewarded(info, model, {"dtype": "bfloat16", "adapter": LoraConfig(rank=8)}),
        "ppo": _ppo(info, model),
        "reward": _reward(info, model, scratch),
        "lost": _lost(info, model),
    }


def _grpo_raises_rewarded(info: RankInfo, model: Path, fields: dict[str, Any]) -> dict[str, Any]:
    groups = make_groups(4, 4, seed=9)
    handles = [handle_of(group, [1.0, 0.0, 0.0, None]) for group in groups]
    algorithm = GrpoConfig.model_validate({"policy": {"kl": {"coefficient": 0.01}}})
    worker = LearnerWorker(
        learner_config(model, optim=OptimConfig(lr=3e-3), **fields),
        LocalStore(),
        info,
        algorithm=algorithm,
        total_steps=4,
        temperature=0.8,
    )
    worker.start()
    mine = share(handles, info)
    before = log_probs(worker, mine, reference=False)
    metrics = [worker.update(mine) for _ in range(4)]
    after = log_probs(worker, mine, reference=False)
    reference = log_probs(worker, mine, reference=True)
    worker.stop()

    def gains(sibling: int) -> list[float]:
        return [float(a[sibling].sum() - b[sibling].sum()) for a, b in zip(after, before, strict=True)]

    return {
        "metrics": metrics,
        "rewarded": gains(0),
        "others": [x for sibling in (1, 2) for x in gains(sibling)],
        "reference_off": max(
            float(abs(r - b).max())
            for siblings in zip(reference, before, strict=True)
            for r, b in zip(*siblings, strict=True)
        ),
    }


class _LossyStore(LocalStore):
    """A payload of None is gone with its node."""

    def get(self, handle: Any) -> Any:
        if handle is None:
            raise ValueLostError("store", found="a node that went away", needed="the group", action="Look.")
        return handle


def _lost(info: RankInfo, model: Path) -> dict[str, Any]:
    """The last rank finds a group gone: all say so, nothing has changed, and the step can be done again."""
    algorithm = GrpoConfig()
    worker = LearnerWorker(learner_config(model), _LossyStore(), info, algorithm=algorithm, total_steps=2)
    worker.start()
    handles = share(scored_handles(), info)
    before = weights(worker)
    gone = [replace(handles[0], payload=None), *handles[1:]] if info.rank == info.world_size - 1 else handles
    uids = []
    for call in (worker.update, worker.annotate):
        try:
            call(gone)
        except RolloutsLostError as error:
            uids.append(error.uids)
    unchanged = all(np.array_equal(value, before[name]) for name, value in weights(worker).items())
    metrics = worker.update(handles)
    worker.stop()
    uid = scored_handles()[info.world_size - 1].uid
    return {"uids": uids, "expected": [(uid,)] * 2, "unchanged": unchanged, "skipped": metrics["skipped"]}


def _ppo(info: RankInfo, model: Path) -> dict[str, Any]:
    """Critic and policy, two epochs of two mini-batches, the reference from the policy's own start.

    The engine's log-probs are far from the policy's own, as they are where its arithmetic or its weights differ.
    """
    algorithm = PpoConfig.model_validate({"num_epochs": 2, "num_mini_batches": 2, "reward_kl": {"coefficient": 0.02}})
    store = LocalStore()
    common: dict[str, Any] = {"algorithm": algorithm, "total_steps": 6}
    optim = OptimConfig(lr=3e-3)
    policy = LearnerWorker(learner_config(model, optim=optim), store, info, **common)
    policy.start()
    critic = LearnerWorker(learner_config(model, optim=optim), store, info, is_critic=True, **common)
    critic.start()
    handles = share([handle_of(group, [1.0, -1.0]) for group in make_groups(8, 2, seed=4)], info)
    losses, results, signals = [], [], []
    policy._algorithm, critic._algorithm = (_Watched(worker._algorithm, signals) for worker in (policy, critic))
    for _ in range(6):
        groups = critic.annotate(policy.annotate(handles))
        losses.append(critic.update(groups))
        results.append(policy.update(groups))
    annotated = sorted(groups[0].annotations)
    refused = ""
    try:
        critic.update(critic.annotate(handles))
    except DataError as error:
        refused = str(error)
    critic.stop()
    policy.stop()
    pairs = list(zip(signals[0::2], signals[1::2], strict=True))
    same_signals = all(torch.equal(a.returns, b.returns) and torch.equal(a.advantages, b.advantages) for a, b in pairs)
    return {
        "critic": losses,
        "policy": results,
        "annotated": annotated,
        "same_signals": same_signals,
        "num_pairs": len(pairs),
        "refused": refused,
    }


class _Watched:
    """An algorithm that keeps every step's signals."""

    def __init__(self, inner: Any, signals: list[Any]) -> None:
        self.inner, self.found = inner, signals

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def signals(self, *args: Any) -> Any:
        self.found.append(self.inner.signals(*args))
        return self.found[-1]


def _reward(info: RankInfo, model: Path, scratch: Path) -> dict[str, Any]:
    """A reward model learns to rank by one token; its scores are saved, normalised and read back by the scorer."""
    from actors.scorer import ScorerWorker

    def group(seed: int) -> TrainGroup:
        (base,) = make_groups(1, 3, seed=seed)
        good = np.append(base.completion_ids[0], np.int32(7)).astype(np.int32)
        return TrainGroup(base.uid, base.prompt_ids, (good, *base.completion_ids[1:]), ranks=(1.0, 2.0, math.nan))

    train, held_out = [group(seed) for seed in range(8)], [group(seed) for seed in range(50, 58)]
    worker = LearnerWorker(
        learner_config(model, optim=OptimConfig(lr=3e-3)), LocalStore(), info, objective=RankConfig(), total_steps=30
    )
    worker.start()
    for _ in range(30):
        metrics = worker.train_step(share(train, info))
    evaluated = worker.evaluate(held_out if info.rank == 0 else [])
    scores = worker.sequence_scores(held_out)
    worker.fit_normaliser(share(held_out, info))
    folder = scratch / f"reward{info.world_size}"
    worker.export(folder)
    worker.stop()
    scorer = ScorerWorker(folder, LocalStore())
    scorer.start()
    found = scorer.score([handle_of(g, [None, None, None]) for g in held_out])
    return {
        "metrics": metrics,
        "evaluated": evaluated,
        "scores": scores,
        "scored": [[score.value for score in siblings] for siblings in found],
        "raw": [[score.components["reward_model_raw"] for score in siblings] for siblings in found],
        "folder": folder,
    }


def three_skips(info: RankInfo, model: Path, scratch: Path) -> str:
    """Weights that are not finite themselves: every step is skipped, the third ends it."""
    from safetensors.torch import load_file, save_file

    broken = scratch / f"broken{info.rank}"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    worker = LearnerWorker(learner_config(broken), LocalStore(), info, objective=SupervisedConfig(), total_steps=10)
    worker.start()
    groups = share(make_groups(4, 2), info)
    skips = [worker.train_step(groups)["consecutive_skips"] for _ in range(2)]
    assert skips == [1.0, 2.0]
    try:
        worker.train_step(groups)
    except NonFiniteError as error:
        return str(error)
    finally:
        worker.stop()
    return ""
