"""Maps of words carried along self-attention, and made into labels: AttenCraft's extraction.

With c_k the map of concept k (squared, from 0 to 1), P the mean self-attention map over heads
and sites, whose rows sum to 1, and n the power,

    M_k = minmax(P^n c_k),   label k where M_k - M_j > margin for every other j

P^n c_k is n times an attention with queries and keys as they were and the maps as values, so
neither P nor its power is ever formed. The official code stretches P to 0..1 as a whole, before
and after the power. That is a factor and the same number taken from every entry, and since rows of
P sum to 1, both only scale P^n c_k and shift all of it: after minmax M_k is the same.

Every step along P mixes; with n growing all maps become multiples of one slow pattern, and minmax
makes them equal. On small grids, where attention is wide, that comes early.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

__all__ = ["carried", "labelled", "minmax", "sharpened"]

_FLAT = 1e-12
"""Spread below which a map is taken for constant."""


def minmax(maps: Tensor) -> Tensor:
    """Return maps [..., m] stretched to 0..1; a constant one becomes 0."""
    low, high = maps.aminmax(dim=-1, keepdim=True)
    spread = high - low
    return torch.where(spread > _FLAT, (maps - low) / spread.clamp_min(_FLAT), 0)


def sharpened(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps on another grid, squared and stretched to 0..1.

    Args:
        maps: [b, k, f, h, w].
        size: (height, width) of the result.

    Returns:
        [b, k, f x height x width]; resized bicubically, where that falls below 0 set to 0.
    """
    if maps.shape[-2:] != size:
        flat = functional.interpolate(maps.flatten(0, 1), size, mode="bicubic")
        maps = flat.unflatten(0, maps.shape[:2])
    return minmax(maps.clamp_min(0).flatten(2) ** 2)


def carried(
    maps: Tensor, sites: Sequence[tuple[Tensor, Tensor, float | None]], power: int
) -> Tensor:
    """Return P^power c, row-stochastic P, without forming P.

    Args:
        maps: c [b, k, m].
        sites: (queries, keys, scale) of each site, both [b, h, m, d]; P is the mean of their maps
            over all heads.
        power: n, at least 0.

    Returns:
        [b, k, m] in the dtype of the maps.
    """
    heads = sum(q.shape[1] for q, _, _ in sites)
    for _ in range(power):
        total = torch.zeros_like(maps)
        for q, k, scale in sites:
            values = maps.transpose(-1, -2)[:, None].expand(-1, q.shape[1], -1, -1)
            out = functional.scaled_dot_product_attention(
                q.to(maps.dtype), k.to(maps.dtype), values.contiguous(), scale=scale
            )
            total = total + out.sum(1).transpose(-1, -2)
        maps = total / heads
    return maps


def labelled(soft: Tensor, margin: float) -> Tensor:
    """Return which concept each place belongs to, -1 for none.

    Args:
        soft: M [b, k, ...], from 0 to 1.
        margin: by how much a concept must exceed every other.

    Returns:
        int64 [b, ...]: k where M_k - M_j > margin for every other j.
    """
    if soft.shape[1] == 1:
        return torch.where(soft[:, 0] > margin, 0, -1)
    top = soft.topk(2, dim=1)
    apart = top.values[:, 0] - top.values[:, 1]
    return torch.where(apart > margin, top.indices[:, 0], -1)
