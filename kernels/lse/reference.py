"""Attention with row log-sum-exp, in chunks of queries, on any device.

With (output, LSE) of disjoint groups of keys, attention over their union is a weighted mean:
no map over all keys is needed to edit, drop or re-weight a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["attention_with_lse", "merge_attention", "query_chunks"]

_CHUNK_ELEMENTS = 1 << 24
"""Largest number of logits held at once."""


def query_chunks(q: Tensor, keys: int) -> Iterator[slice]:
    """Yield slices of the queries [B, H, Nq, D] so that no chunk holds too many logits."""
    rows = max(1, _CHUNK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * keys))
    for start in range(0, q.shape[2], rows):
        yield slice(start, min(start + rows, q.shape[2]))


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T + mask) v and the log-sum-exp of its logits.

    Args:
        q: [B, H, Nq, D].
        k: [B, H, Nk, D].
        v: [B, H, Nk, Dv].
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        Output [B, H, Nq, Dv] in the dtype of q, and LSE [B, H, Nq] in float32 (float64 for
        float64 inputs). A row without any key gives output 0 and LSE -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, lses = [], []
    for rows in query_chunks(q, k.shape[2]):
        logits = (q[:, :, rows].to(wide) * scale) @ k.to(wide).transpose(-1, -2)
        logits = _masked(logits, mask, rows)
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse.clamp_min(torch.finfo(wide).min)[..., None])
        outs.append((weights @ v.to(wide)).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _masked(logits: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    if mask is None:
        return logits
    if mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key groups into attention over their union.

    Args:
        outs: outputs [B, H, Nq, Dv], one per group.
        lses: their log-sum-exps [B, H, Nq].

    Returns:
        sum_g exp(lse_g - lse) out_g with lse = log sum_g exp(lse_g), and that lse.
    """
    stacked = torch.stack(tuple(lses))
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse.clamp_min(torch.finfo(lse.dtype).min))
    total = sum(w[..., None] * o.to(w.dtype) for w, o in zip(weights, outs, strict=True))
    assert isinstance(total, Tensor)
    return total.to(outs[0].dtype), lse
