"""Attention over rows in which siblings share their prompt, computed on the parts that may see each other only.

In the square of a whole row most places are masked: completions do not look at one another. So the prompts attend to
themselves in one call of torch's kernel, and every completion to its prompt and itself in another:

    row   P P P a a a b b        P  1            a  P P P 1          b  P P P 1
                                 P  1 1          a  P P P 1 1        b  P P P 1 1
                                 P  1 1 1        a  P P P 1 1 1

With P prompt tokens, K siblings and T tokens each, that is P^2 + K T (P + T) products of a query and a key in place of
(P + K T)^2. Legend: B rows, S tokens in a row, N sequences, P longest prompt, T longest completion, H heads, H_kv heads
of keys and values, D width of a head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rlhf.maths.packing import PROMPT_SEGMENT, PackedBatch

SHARED_PROMPT = "shared_prompt"
"""Name of this attention in transformers' registry."""
PLAIN_BELOW = 128 * 256
"""Products of queries and keys, for one head of one sequence, up to which torch's plain formula trains faster on a CPU
than its fused kernel, whose backward pass costs some 80 microseconds there however short the sequence is."""


@dataclass(frozen=True, slots=True)
class SiblingLayout:
    """Where prompts and completions lie in a batch's rows; the same for every layer.

    Attributes:
        prompt_width: P.
        row_index: The row of each sequence. int64 [N]
        own_index: Place of each completion token among all rows' tokens; padding repeats a token of its row.
            int64 [N * T]
        mask: 0 where a completion token may look, the dtype's lowest number elsewhere: first the prompt's tokens, then
            the completion's own. [N, 1, T, P + T]
        output_index: For each token of the rows, its place among the prompts' outputs followed by the completions'.
            int64 [B * S]
    """

    prompt_width: int
    row_index: Tensor
    own_index: Tensor
    mask: Tensor
    output_index: Tensor

    @classmethod
    def of(cls, batch: PackedBatch, dtype: torch.dtype) -> SiblingLayout:
        """The layout of a batch, with a mask for a model that computes in ``dtype``."""
        device, (num_rows, length) = batch.input_ids.device, batch.input_ids.shape
        num_sequences, longest = batch.length_mask.shape
        prompts = (batch.segment_ids == PROMPT_SEGMENT).sum(-1)
        width = int(prompts.max())
        steps = torch.arange(longest, device=device)

        starts = batch.last_index - batch.length_mask.sum(-1) + 1
        places = torch.minimum(starts[:, None] + steps, batch.last_index[:, None])
        own_index = batch.row_index[:, None] * length + places

        of_prompt = torch.arange(width, device=device) < prompts[batch.row_index, None]
        of_own = steps[:, None] >= steps
        allowed = torch.cat(
            [
                of_prompt[:, None].expand(-1, longest, -1),
                of_own.expand(num_sequences, -1, -1),
            ],
            dim=-1,
        )
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        mask.masked_fill_(~allowed, torch.finfo(dtype).min)

        # Padding reads its row's first prompt token: any number will do there, as long as it is finite.
        rows = torch.arange(num_rows, device=device)[:, None] * width
        output_index = rows.expand(-1, length).clone()
        head = torch.arange(min(width, length), device=device)
        in_prompt = head < prompts[:, None]
        output_index[:, : len(head)] = torch.where(in_prompt, rows + head, output_index[:, : len(head)])
        flat = output_index.flatten()
        own = torch.arange(num_sequences * longest, device=device).view(num_sequences, longest)
        flat[own_index[batch.length_mask]] = num_rows * width + own[batch.length_mask]
        return cls(width, batch.row_index, own_index.flatten(), mask.unsqueeze(1), flat)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    siblings: SiblingLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers' models call.

    Args:
        module: The layer's attention; only its signature's place is used.
        query: [B, H, S, D]
        key: [B, H_kv, S, D]
        value: [B, H_kv, S, D]
        attention_mask: None: what may be seen follows from ``siblings``.
        siblings: Where prompts and completions lie; None means that every row is one causal sequence.
        dropout: On the attention weights.
        scaling: Of the products of queries and keys; None divides by the root of D.

    Returns:
        [B, S, H, D], and None for the weights, which the kernels do not give.
    """
    assert attention_mask is None, "masked rows go through the kernels sdpa and eager"
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if siblings is None:
        key, value = (_spread(part, query.shape[1]) for part in (key, value))
        outputs = scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        return outputs.transpose(1, 2).contiguous(), None
    width = siblings.prompt_width
    prompt_key, prompt_value = (_spread(part[:, :, :width], query.shape[1]) for part in (key, value))
    with _kernel_for(query, width * width):
        of_prompts = scaled_dot_product_attention(
            query[:, :, :width], prompt_key, prompt_value, is_causal=True, **options
        ).transpose(1, 2)
    own_key, own_value = (_spread(_seen_by_siblings(part, siblings), query.shape[1]) for part in (key, value))
    own_query = _own_tokens(query, siblings).transpose(1, 2)
    with _kernel_for(query, siblings.mask[0].numel()):
        of_siblings = scaled_dot_product_attention(
            own_query, own_key, own_value, attn_mask=siblings.mask, **options
        ).transpose(1, 2)
    outputs = torch.cat([of_prompts.flatten(0, 1), of_siblings.flatten(0, 1)])
    outputs = outputs.index_select(0, siblings.output_index)
    return outputs.unflatten(0, (query.shape[0], query.shape[2])), None


def _kernel_for(query: Tensor, num_products: int) -> AbstractContextManager[None]:
    """A context that chooses the plain formula where it is the faster one to train through."""
    is_plain = query.device.type == "cpu" and query.requires_grad and num_products <= PLAIN_BELOW
    return sdpa_kernel(SDPBackend.MATH) if is_plain else nullcontext()


def _own_tokens(states: Tensor, siblings: SiblingLayout) -> Tensor:
    """[B, H, S, D] -> the completions' tokens [N, T, H, D]."""
    tokens = states.transpose(1, 2).flatten(0, 1).index_select(0, siblings.own_index)
    return tokens.unflatten(0, (len(siblings.row_index), -1))


def _seen_by_siblings(states: Tensor, siblings: SiblingLayout) -> Tensor:
    """Keys or values [B, H_kv, S, D] -> each sequence's prompt and completion [N, H_kv, P + T, D]."""
    prompts = states[:, :, : siblings.prompt_width].transpose(1, 2).index_select(0, siblings.row_index)
    return torch.cat([prompts, _own_tokens(states, siblings)], dim=1).transpose(1, 2)


def _spread(states: Tensor, num_heads: int) -> Tensor:
    """Repeats heads of keys or values for the queries that share them."""
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def register() -> str:
    """Makes transformers know this attention and returns its name for ``attn_implementation``."""
    from transformers import AttentionInterface

    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
    return SHARED_PROMPT
