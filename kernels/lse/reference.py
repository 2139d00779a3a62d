"""Attention with row log-sum-exp, in chunks of queries, on any device.

With (output, LSE) of disjoint groups of keys, attention over their union is a weighted mean:
no map over all keys is needed to edit, drop or re-weight a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["attention_with_lse", "logit_chunks", "merge_attention", "query_chunks"]

_CHUNK_ELEMENTS = 1 << 24
"""Largest number of logits held at once."""


def query_chunks(q: Tensor, keys: int, most: int = _CHUNK_ELEMENTS) -> Iterator[slice]:
    """Yield slices of the queries so that no chunk holds more than `most` logits.

    Args:
        q: [B, H, Nq, D].
        keys: number of keys.
        most: largest B x H x rows x keys of a chunk; a chunk has at least one row.

    Returns:
        Slices that cover 0 to Nq in order; one empty slice if there are no queries.
    """
    rows = max(1, most // max(1, q.shape[0] * q.shape[1] * keys))
    for start in range(0, max(1, q.shape[2]), rows):
        yield slice(start, min(start + rows, q.shape[2]))


def logit_chunks(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    most: int = _CHUNK_ELEMENTS,
) -> Iterator[Tensor]:
    """Yield scale q k^T + mask for successive chunks of queries.

    Args:
        q: [B, H, Nq, D].
        k: [B, H, Nk, D].
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits, None for 1/sqrt(D).
        most: largest number of logits in a chunk.

    Returns:
        [B, H, rows, Nk] in float32 (float64 for float64 inputs).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    transposed = k.to(wide).transpose(-1, -2)
    for rows in query_chunks(q, k.shape[2], most):
        yield _masked((q[:, :, rows].to(wide) * scale) @ transposed, mask, rows)


def _masked(logits: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    if mask is None:
        return logits
    if mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask.to(logits.dtype)


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
    outs, lses = [], []
    values = v.to(torch.promote_types(q.dtype, torch.float32))
    for logits in logit_chunks(q, k, mask, scale):
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - _finite(lse)[..., None])
        outs.append((weights @ values).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _finite(lse: Tensor) -> Tensor:
    """Keep -inf - (-inf) out: a row without keys gets weights exp(-inf) = 0."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key groups into attention over their union.

    Args:
        outs: outputs [B, H, Nq, Dv], one per group; finite also where a group has no key.
        lses: their log-sum-exps [B, H, Nq], -inf where a group has no key.

    Returns:
        sum_g exp(lse_g - lse) out_g with lse = log sum_g exp(lse_g), and that lse. A row
        that no group has a key for gives output 0 and LSE -inf.
    """
    stacked = torch.stack(tuple(lses))
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - _finite(lse))
    total = sum(w[..., None] * o.to(w.dtype) for w, o in zip(weights, outs, strict=True))
    assert isinstance(total, Tensor)
    return total.to(outs[0].dtype), lse
