"""Sharing the prompt must not change a log-probability: a real Llama, against one sequence per row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.maths.packing import PackedBatch, pack
from rlhf.types import TrainGroup
from tests.tiny import build_tiny_model

PAD = 0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def make_groups(seed: int = 0) -> list[TrainGroup]:
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, 300, length).astype(np.int32)

    return [
        TrainGroup("a", ids(5), (ids(7), ids(1), ids(4))),
        TrainGroup("b", ids(2), (ids(3),)),
        TrainGroup("c", ids(9), (ids(6), ids(0), ids(2), ids(6))),
    ]


def log_probs(model, batch: PackedBatch, mask: torch.Tensor | None) -> torch.Tensor:
    hidden = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask).logits
    picked = torch.log_softmax(batch.gather_targets(hidden), -1)
    return batch.scatter_targets(picked.gather(-1, batch.target_ids[batch.length_mask][:, None])[:, 0])


def one_by_one(model, groups: list[TrainGroup]) -> list[torch.Tensor]:
    """No packing, no padding, no mask: each sequence through the model alone."""
    result = []
    for group in groups:
        for completion in group.completion_ids:
            row = torch.from_numpy(np.concatenate([group.prompt_ids, completion])).long()[None]
            logits = model(input_ids=row).logits[0].log_softmax(-1)
            start = len(group.prompt_ids)
            result.append(logits[start - 1 : -1].gather(-1, row[0, start:, None])[:, 0])
    return result


@pytest.mark.parametrize(
    ("implementation", "form"),
    [("sdpa", "bool"), ("sdpa", "additive"), ("eager", "additive"), ("sdpa", "own_rows"), ("eager", "own_rows")],
)
def test_shared_prefix_equals_one_sequence_per_row(model_folder, implementation, form):
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation=implementation)
    groups = make_groups()
    batch = pack(groups, pad_id=PAD, multiple_of=8, share_prefix=form != "own_rows")
    mask = {"bool": batch.attention_mask(), "additive": batch.attention_mask(torch.float32), "own_rows": None}[form]
    with torch.no_grad():
        ours, expected = log_probs(model, batch, mask), one_by_one(model, groups)
    for n, length in enumerate(batch.length_mask.sum(-1).tolist()):
        torch.testing.assert_close(ours[n, :length], expected[n], atol=1e-5, rtol=0)
