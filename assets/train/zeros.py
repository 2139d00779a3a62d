"""The zero tokens that stand for a missing T5 encoder, folded into one.

`StableDiffusion3Pipeline` without a third text encoder appends ``max_sequence_length`` (256 by
default) all-zero tokens to the prompt. They carry no position, so they stay equal to each other
in every layer, and n equal keys in a softmax are one key whose logit is raised by log n. Training
with one such token is therefore the same computation at less than half the cost. The logit is
raised through eight further dimensions of the heads (q one, k the logarithm), so that every
attention kernel can be used.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

EXTRA = 8
NONE = -1e4


def log_count(count: Tensor) -> Tensor:
    """Logit that makes one key weigh like ``count`` keys; no keys at all for 0."""
    return torch.where(count > 0, count.clamp(min=1).float().log(), NONE)


class FoldedZeros:
    """Joint attention whose last text token weighs like ``exp(log_zeros)`` equal ones."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        log_zeros: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs for image ``[B, N, D]`` and text ``[B, M, D]``; ``log_zeros`` ``[B]`` or [1]."""
        image = _heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        text = _heads(
            attn, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        )
        image = attn.norm_q(image[0]), attn.norm_k(image[1]), image[2]
        text = attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2]
        q, k, v = (torch.cat(both, dim=2) for both in zip(image, text, strict=True))
        out = weighted_attention(q, k, v, log_zeros).transpose(1, 2).flatten(2).to(v.dtype)
        length = hidden_states.shape[1]
        rest = out[:, length:]
        rest = rest if attn.context_pre_only else attn.to_add_out(rest)
        return attn.to_out[0](out[:, :length]), rest


def _heads(attn: Attention, states: Tensor, *projections: torch.nn.Module) -> tuple[Tensor, ...]:
    batch, length, _ = states.shape
    return tuple(
        one(states).view(batch, length, attn.heads, -1).transpose(1, 2) for one in projections
    )


def weighted_attention(q: Tensor, k: Tensor, v: Tensor, log_zeros: Tensor | None) -> Tensor:
    """Attention ``[B, H, L, D]`` with ``log_zeros`` ``[B]`` added to the last key's logits."""
    width = q.shape[-1]
    if log_zeros is None:
        return scaled_dot_product_attention(q, k, v)
    raised = log_zeros.float() * width**0.5
    coarse = raised.to(v.dtype)
    fine = (raised - coarse.float()).to(v.dtype)
    last = torch.stack([coarse, fine], dim=-1)[:, None, None, :]
    last = pad(last.expand(*k.shape[:2], -1, -1), (0, EXTRA - 2, k.shape[2] - 1, 0))
    q = pad(q.to(v.dtype), (0, EXTRA), value=1.0)
    k = torch.cat([k.to(v.dtype), last], dim=-1)
    out = scaled_dot_product_attention(q, k, pad(v, (0, EXTRA)), scale=width**-0.5)
    return out[..., :width]
