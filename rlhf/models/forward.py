"""The model on packed rows: log-probabilities, values and scores at the places that count.

Only hidden states that predict a completion token go through the head: for a vocabulary of 49,152 the logits of the
prompt would cost more than a layer. Legend: B rows, S tokens in a row, N sequences, T longest completion, M real
completion tokens of the batch, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlhf.maths.ops import token_log_probs
from rlhf.maths.packing import PackedBatch
from rlhf.models.adapters import backbone
from rlhf.models.attention import SHARED_PROMPT, SiblingLayout
from rlhf.models.load import head_of
from rlhf.objectives.base import Head, ModelOutputs


def hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The backbone's last hidden states of every row. [B, S, D]."""
    inner = backbone(model)
    dtype = next(inner.parameters()).dtype
    options: dict[str, Any] = {}
    if not batch.is_causal:
        config: Any = inner.config
        if config._attn_implementation == SHARED_PROMPT:
            options["siblings"] = SiblingLayout.of(batch, dtype)
        else:
            options["attention_mask"] = batch.attention_mask(dtype)
    outputs = inner(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options)
    hidden: Tensor = outputs.last_hidden_state
    return hidden


def language_outputs(
    model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, need_entropy: bool = False
) -> ModelOutputs:
    """Log-probabilities of the completions.

    Args:
        model: Causal language model, PEFT or plain.
        batch: Rows on the model's device.
        temperature: Logits are divided by it, as the sampler did; 0, the likeliest token, counts as 1, as engines
            report its log-probs.
        need_entropy: Whether to compute the entropy at each target as well.

    Returns:
        ``log_probs`` and, if asked for, ``entropy``: float32 [N, T], zero at padding.
    """
    hidden = batch.gather_targets(hidden_states(model, batch))
    # One call of the head whatever the number of targets: where its weights are sharded, each call is a collective.
    logits = head_of(model, "language_model")(hidden)
    targets = batch.target_ids[batch.length_mask]
    log_probs, entropy = token_log_probs(logits, targets, temperature=temperature or 1.0, with_entropy=need_entropy)
    return ModelOutputs(
        log_probs=batch.scatter_targets(log_probs),
        entropy=None if entropy is None else batch.scatter_targets(entropy),
    )


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
