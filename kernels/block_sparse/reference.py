"""Block-sparse attention in plain torch, a row of blocks at a time, on any device.

The oracle of the other backends.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .mask import BlockMask

__all__ = ["block_sparse_reference", "logits_of", "own", "work"]

_CHUNK_ELEMENTS = 1 << 24
"""Largest number of logits held at once."""


def block_sparse_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T + mask) v over the kept blocks, and the log-sum-exp.

    Computed in float32, float64 for float64 inputs; `gradient.py` has the gradient.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: kept blocks, on the device of q.
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        Output [B, H, Nq, Dv] in the dtype of q and LSE [B, H, Nq] in float32 (float64 for
        float64 inputs). A row without any key gives output 0 and LSE -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for b, rows in own(mask.batch, q.shape[0]):
        per_head = [
            _heads(q[rows, heads], _kv(k[rows], q, heads), _kv(v[rows], q, heads),
                   mask, b, h, scale)
            for h, heads in own(mask.heads, q.shape[1])
        ]  # fmt: skip
        outs.append(torch.cat([out for out, _ in per_head], dim=1))
        lses.append(torch.cat([lse for _, lse in per_head], dim=1))
    return torch.cat(outs), torch.cat(lses)


def own(lists: int, size: int) -> Iterator[tuple[int, slice]]:
    """Yield each list's number with the batch entries (or heads) that use it."""
    if lists == 1:
        yield 0, slice(0, size)
    else:
        yield from ((i, slice(i, i + 1)) for i in range(size))


def _kv(x: Tensor, q: Tensor, heads: slice) -> Tensor:
    """Return the keys or values of some query heads; not repeated where all are taken."""
    group = q.shape[1] // x.shape[1]
    if heads.stop - heads.start == q.shape[1]:
        return x
    return x[:, heads.start // group : heads.start // group + 1]


def _heads(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, b: int, h: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and LSE of heads that share one list."""
    parts = [
        _row(q[:, :, at], k, v, tokens, allowed, scale)
        for at, tokens, allowed in work(mask, b, h, q.shape[0] * q.shape[1])
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def work(mask: BlockMask, b: int, h: int, maps: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (queries, key tokens [n], bool [queries, n]), few enough queries to be held."""
    for r in range(mask.rows):
        tokens, allowed = _keys(mask, b, h, r)
        start, stop = r * mask.block, min((r + 1) * mask.block, mask.nq)
        most = max(1, _CHUNK_ELEMENTS // max(1, maps * len(tokens)))
        for first in range(start, stop, most):
            last = min(first + most, stop)
            yield slice(first, last), tokens, allowed[first - start : last - start]


def _keys(mask: BlockMask, b: int, h: int, r: int) -> tuple[Tensor, Tensor]:
    """Return the key tokens of a row of blocks, and which of them each query may attend to."""
    full, part = mask.lists.row(b, h, r), mask.parts.row(b, h, r)
    tiles = mask.tiles(mask.part_bits[part])  # [p, block, block]
    whole = tiles.new_ones(full.stop - full.start, mask.block, mask.block)
    allowed = torch.cat([whole, tiles]).transpose(0, 1).flatten(1)
    columns = torch.cat([mask.lists.idx[full], mask.parts.idx[part]]).long()
    inside = torch.arange(mask.block, device=columns.device)
    tokens = (columns[:, None] * mask.block + inside).flatten()
    real = tokens < mask.nk
    return tokens[real], allowed[:, real]


def _row(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    logits, _, _, values = logits_of(q, k, v, tokens, allowed, scale)
    lse = torch.logsumexp(logits, dim=-1)
    # a row without keys: exp(-inf - 0) = 0 instead of exp(-inf + inf)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return (weights @ values).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def logits_of(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits of some queries on some keys, and what they are made of.

    Args:
        q: [B, H, rows, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        tokens: the keys, int64 [n].
        allowed: bool [rows, n].
        scale: factor on the logits.

    Returns:
        Logits [B, Hkv, g, rows, n], -inf where not allowed, the scaled queries
        [B, Hkv, g, rows, D], the keys [B, Hkv, 1, n, D] and the values [B, Hkv, 1, n, Dv].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (k.shape[1], -1)) * scale
    keys, values = (x[:, :, None, tokens].to(wide) for x in (k, v))
    logits = (grouped @ keys.transpose(-1, -2)).masked_fill(~allowed, -torch.inf)
    return logits, grouped, keys, values
