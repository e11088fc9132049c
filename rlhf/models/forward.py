"""The model on packed rows: log-probabilities, values and scores at the places that count.

Only hidden states that predict a completion token go through the head: for a vocabulary of 49,152 the logits of the
prompt would cost more than a layer. Legend: B rows, S tokens in a row, N sequences, T longest completion, M real
completion tokens of the batch, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.maths.packing import PackedBatch
from rlhf.models.adapters import backbone
from rlhf.models.load import head_of
from rlhf.objectives.base import Head, ModelOutputs

HEAD_ROWS = 1024
SOFTMAX_ELEMENTS = 1 << 22


def hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The backbone's last hidden states of every row. [B, S, D]."""
    inner = backbone(model)
    dtype = next(inner.parameters()).dtype
    mask = None if batch.is_causal else batch.attention_mask(dtype)
    outputs = inner(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
    hidden: Tensor = outputs.last_hidden_state
    return hidden


def language_outputs(
    model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, need_entropy: bool = False
) -> ModelOutputs:
    """Log-probabilities of the completions.

    Args:
        model: Causal language model, PEFT or plain.
        batch: Rows on the model's device.
        temperature: Logits are divided by it, as the sampler did.
        need_entropy: Whether to compute the entropy at each target as well.

    Returns:
        ``log_probs`` and, if asked for, ``entropy``: float32 [N, T], zero at padding.
    """
    hidden = batch.gather_targets(hidden_states(model, batch))
    targets = batch.target_ids[batch.length_mask]
    head = head_of(model, "language_model")
    parts = [
        token_log_probs(head(hidden[i : i + HEAD_ROWS]), targets[i : i + HEAD_ROWS], temperature, need_entropy)
        for i in range(0, len(targets), HEAD_ROWS)
    ] or [(hidden.sum(-1).float(), hidden.sum(-1).float())]
    log_probs = batch.scatter_targets(torch.cat([part[0] for part in parts]))
    entropy = batch.scatter_targets(torch.cat([part[1] for part in parts])) if need_entropy else None
    return ModelOutputs(log_probs=log_probs, entropy=entropy)


def scalar_outputs(model: nn.Module, batch: PackedBatch, *, per_token: bool) -> ModelOutputs:
    """Scores or values.

    Args:
        model: Sequence-classification model with one label.
        batch: Rows on the model's device.
        per_token: True gives ``token_values`` [N, T], the value of the state before each target; False gives
            ``sequence_scores`` [N], read at each sequence's last token.
    """
    hidden = hidden_states(model, batch)
    head = head_of(model, "scalar")
    if per_token:
        values = head(batch.gather_targets(hidden)).squeeze(-1).float()
        return ModelOutputs(token_values=batch.scatter_targets(values))
    return ModelOutputs(sequence_scores=head(batch.gather_last(hidden)).squeeze(-1).float())


class PackedModel(nn.Module):
    """A model whose ``forward`` takes a ``PackedBatch``, so that an engine that wraps modules sees one call.

    Args:
        model: What ``load_policy`` or ``load_scalar`` gave.
        head: Which of the two.
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def forward(self, batch: PackedBatch, options: dict[str, Any]) -> dict[str, Tensor]:
        """Runs ``language_outputs`` or ``scalar_outputs``; the dict holds what they set, as engines hook on tensors."""
        if self.head == "language_model":
            outputs = language_outputs(self.model, batch, **options)
        else:
            outputs = scalar_outputs(self.model, batch, **options)
        fields = {
            "log_probs": outputs.log_probs,
            "entropy": outputs.entropy,
            "token_values": outputs.token_values,
            "sequence_scores": outputs.sequence_scores,
        }
        return {name: value for name, value in fields.items() if value is not None}


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, need_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log softmax(logits / temperature) at the targets, in fp32, without an fp32 copy of all logits.

    Args:
        logits: Any floating dtype. [M, V]
        targets: int64 [M]
        temperature: Above 0.
        need_entropy: Whether the second result is the entropy in nats; else it is zero.

    Returns:
        Two float32 tensors [M]; gradients flow through both.
    """
    log_probs, entropy = _TokenLogProbs.apply(logits, targets, temperature, need_entropy)
    return log_probs, entropy


class _TokenLogProbs(torch.autograd.Function):
    """Keeps the logits as they came and their log-sum-exp; the softmax is made again, a few rows at a time.

    With p = softmax(x / t), z = x / t - logsumexp(x / t), H = -sum p z:
    d log p_y / dx_j = ((j = y) - p_j) / t and dH / dx_j = -p_j (z_j + H) / t.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, need_entropy: bool) -> Any:
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        entropy, normaliser = torch.zeros_like(log_probs), torch.empty_like(log_probs)
        for rows in _row_slices(logits):
            scaled = logits[rows].to(torch.float32, copy=True).div_(temperature)
            total = torch.logsumexp(scaled, -1)
            normaliser[rows] = total
            log_probs[rows] = scaled.gather(-1, targets[rows, None])[:, 0] - total
            if need_entropy:
                scaled.sub_(total[:, None])
                entropy[rows] = -(scaled.exp() * scaled).sum(-1)
        ctx.save_for_backward(logits, targets, normaliser, entropy)
        ctx.temperature, ctx.need_entropy = temperature, need_entropy
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad_log_probs, grad_entropy = gradients
        logits, targets, normaliser, entropy = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _row_slices(logits):
            z = logits[rows].to(torch.float32, copy=True).div_(ctx.temperature).sub_(normaliser[rows, None])
            upstream = grad_log_probs[rows, None]
            if ctx.need_entropy:
                p = z.exp()
                gradient = z.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(upstream).mul_(p).neg_()
            else:
                gradient = z.exp_().mul_(-upstream)
            gradient.scatter_add_(-1, targets[rows, None], upstream)
            result[rows] = gradient.div_(ctx.temperature)
        return result, None, None, None


def _row_slices(logits: Tensor) -> list[slice]:
    step = max(1, SOFTMAX_ELEMENTS // logits.shape[-1])
    return [slice(i, i + step) for i in range(0, len(logits), step)]
