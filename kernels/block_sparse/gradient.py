"""Gradient of block-sparse attention in plain torch, a row of blocks at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import BlockMask
from .reference import logits_of, own, work

__all__ = ["block_sparse_gradient"]


def block_sparse_gradient(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    With P = exp(S - LSE) computed again, row by row:

        dV = P^T dO,  dP = dO V^T,  dS = P (dP - sum(P dP) + dLSE),  dQ = c dS K,  dK = c dS^T Q

    Nothing of size N x N is kept.

    Args:
        grad_out: [B, H, Nq, Dv].
        grad_lse: [B, H, Nq].
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: kept blocks, on the device of q.
        scale: c, the factor on the logits.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    heads_per_kv = q.shape[1] // k.shape[1]
    for b, rows in own(mask.batch, q.shape[0]):
        for h, heads in own(mask.heads, q.shape[1]):
            alone = mask.heads > 1
            kv = slice(h // heads_per_kv, h // heads_per_kv + 1) if alone else slice(None)
            for at, tokens, allowed in work(mask, b, h, q[rows, heads].shape[:2].numel()):
                parts = _row(
                    grad_out[rows, heads, at], grad_lse[rows, heads, at], q[rows, heads, at],
                    k[rows, kv], v[rows, kv], tokens, allowed, scale,
                )  # fmt: skip
                grads[0][rows, heads, at] += parts[0]
                for grad, part in zip(grads[1:], parts[1:], strict=True):
                    grad[rows, kv].index_add_(2, tokens, part)
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _row(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    allowed: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this row's gradient of its queries, and its part in those of its keys and values."""
    logits, grouped, keys, values = logits_of(q, k, v, tokens, allowed, scale)
    weights = torch.softmax(logits, dim=-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    d_out, d_lse = (
        x.to(weights.dtype).unflatten(1, (k.shape[1], -1)) for x in (grad_out, grad_lse)
    )
    d_values = weights.transpose(-1, -2) @ d_out
    d_weights = d_out @ values.transpose(-1, -2)
    mean = (weights * d_weights).sum(-1, keepdim=True)
    # LSE is -inf in a row without keys, and its gradient may then be anything
    d_logits = torch.where(allowed, weights * (d_weights - mean + d_lse[..., None]), 0.0)
    d_queries = scale * (d_logits @ keys)
    d_keys = d_logits.transpose(-1, -2) @ grouped  # `grouped` holds the scale
    return d_queries.flatten(1, 2), d_keys.sum(2), d_values.sum(2)
