"""TRL as an independent second opinion on losses that both compute; its trainers' loss methods run on stand-ins."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf.maths.advantages import group_normalised
from rlhf.maths.ops import token_log_probs
from rlhf.objectives.base import ModelOutputs
from rlhf.objectives.config import KlConfig, PolicyConfig, PreferenceConfig
from rlhf.objectives.policy import PolicyObjective
from rlhf.objectives.preference import PreferenceObjective
from tests.rlhf.objectives.hand import batch_of, run

pytestmark = pytest.mark.slow

LENGTHS = ((5, 2, 4), (3, 5, 1))


class _Accelerator:
    num_processes = 1
    device = torch.device("cpu")
    sync_gradients = False

    def gather(self, value):
        return value

    gather_for_metrics = gather

    def reduce(self, value, reduction):
        return value


def random(batch, seed: int, scale: float = 0.3) -> torch.Tensor:
    return torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(seed)) * scale - 1


def trl_grpo(loss_type: str, batch, log_probs, entropy, signals, **settings):
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_probs, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=settings["beta"],
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=loss_type,
        epsilon_low=settings["clip_low"],
        epsilon_high=settings["clip_high"],
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=7,
        accelerator=_Accelerator(),
        _entropy_bonus_enabled=settings["entropy_coefficient"] > 0,
        use_adaptive_entropy=False,
        entropy_coef=settings["entropy_coefficient"],
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.ones(len(log_probs), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(log_probs), 1, dtype=torch.int64),
        "completion_ids": batch.target_ids,
        "completion_mask": batch.mask.long(),
        "advantages": signals["advantages"],
        "old_per_token_logps": signals["old_log_probs"],
        "ref_per_token_logps": signals["reference_log_probs"],
        "importance_sampling_ratio": (signals["old_log_probs"] - signals["behaviour_log_probs"]).exp().clamp(max=1.2),
        "num_items_in_batch": batch.mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(
    ("loss_type", "aggregation", "fixed_length"),
    [("dapo", "token_mean", None), ("grpo", "sequence_mean", None), ("dr_grpo", "fixed_length", 7)],
)
def test_policy_loss_and_gradient(loss_type, aggregation, fixed_length):
    batch = batch_of(*LENGTHS)
    entropy_coefficient = 0.02 if aggregation == "token_mean" else 0.0  # TRL's bonus is always a token mean
    config = PolicyConfig(
        clip_low=0.2,
        clip_high=0.28,
        importance_cap=1.2,
        kl=KlConfig(coefficient=0.05, estimator="k3"),
        entropy_coefficient=entropy_coefficient,
        aggregation=aggregation,
        fixed_length=fixed_length,
    )
    signals = {
        "advantages": random(batch, 1, 1.0)[:, :1].expand(batch.mask.shape),
        "old_log_probs": random(batch, 2),
        "reference_log_probs": random(batch, 3),
        "behaviour_log_probs": random(batch, 4),
    }
    log_probs, entropy = random(batch, 5).requires_grad_(), random(batch, 6).requires_grad_()
    ours = run(PolicyObjective(config), batch, ModelOutputs(log_probs, entropy), **signals).loss
    settings = {"beta": 0.05, "clip_low": 0.2, "clip_high": 0.28, "entropy_coefficient": entropy_coefficient}
    theirs = trl_grpo(loss_type, batch, log_probs, entropy, signals, **settings)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, log_probs)[0], torch.autograd.grad(theirs, log_probs)[0], atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [("sigmoid", {}), ("ipo", {"variant": "ipo", "length_normalised": True})],
)
def test_preference_loss(loss_type, settings):
    from trl.trainer.dpo_trainer import DPOTrainer

    batch = batch_of((3, 2), (4, 4))
    log_probs, reference = random(batch, 1) * batch.mask, random(batch, 2) * batch.mask
    order = torch.tensor([0, 2, 1, 3])  # TRL: all chosen, then all rejected
    outputs = SimpleNamespace(
        log_probs=log_probs[order],
        entropy=torch.zeros(4, 4),
        mean_logits=torch.zeros(4, 4),
        is_top1=torch.zeros(4, 4, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    completion = torch.cat([torch.zeros(4, 1, dtype=torch.bool), batch.mask[order]], 1).long()
    references = reference.sum(-1)[order].chunk(2)
    inputs = {
        "input_ids": torch.ones(4, 5, dtype=torch.int64),
        "attention_mask": torch.ones(4, 5, dtype=torch.int64),
        "completion_mask": completion,
        "ref_chosen_logps": references[0],
        "ref_rejected_logps": references[1],
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    objective = PreferenceObjective(PreferenceConfig(beta=0.3, **settings))
    signals = {"reference_log_probs": reference, "ranks": torch.tensor([1.0, 2.0, 1.0, 2.0])}
    torch.testing.assert_close(run(objective, batch, ModelOutputs(log_probs), **signals).loss, theirs)


def test_group_standard_deviation():
    from trl.trainer.utils import nanstd

    scores = torch.tensor([[1.0, float("nan"), 4.0, 2.0], [0.5, 0.25, -1.0, 3.0]])
    theirs = (scores - scores.nanmean(1, keepdim=True)) / (nanstd(scores, dim=1, keepdim=True) + 1e-4)
    ours, _ = group_normalised(scores.flatten(), torch.arange(8) // 4, 2)
    torch.testing.assert_close(ours, theirs.nan_to_num(0.0).flatten())


def test_log_probs_and_entropy():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    torch.manual_seed(0)
    logits, targets = torch.randn(9, 33) * 3, torch.randint(0, 33, (9,))
    log_probs, entropy = token_log_probs(logits, targets, with_entropy=True)
    torch.testing.assert_close(log_probs, selective_log_softmax(logits, targets), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, entropy_from_logits(logits), atol=1e-5, rtol=1e-5)
