"""The share of attention that chosen keys get, without the map: exact softmax columns.

A share is attention whose values are 1 at the chosen keys and 0 at others, so on a GPU in half
precision torch's memory-efficient kernel makes it in one launch, with the rounding that the
model's own attention has. Elsewhere chunks of float32 logits are held.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnctl.kernels.lse.reference import logit_chunks

__all__ = ["columns_of", "token_mass"]

_CHUNK_ELEMENTS = 1 << 22
"""Largest number of logits held at once: 16 MB."""
_ALIGNED = 8
"""The kernel takes half-precision rows of a multiple of so many elements."""


def token_mass(
    q: Tensor,
    k: Tensor,
    groups: Sequence[Sequence[int]],
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    each_head: bool = True,
    most: int = _CHUNK_ELEMENTS,
) -> Tensor:
    """Return how much of every query's attention goes to each group of keys.

    Args:
        q: [B, H, Nq, D].
        k: [B, H, Nk, D].
        groups: W groups of key indices, such as the tokens of W words; an empty one gets 0.
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits, None for 1/sqrt(D).
        each_head: False for the sum over the heads, [B, 1, W, Nq].
        most: largest number of logits held at once.

    Returns:
        sum over the group's keys j of exp(scale q k_j + mask_j - lse), lse the log-sum-exp over
        all keys: [B, H, W, Nq] in float32 (float64 for float64 inputs). Queries without any key
        give 0.
    """
    chosen = tuple(map(tuple, groups))
    if mask is None and _has_kernel(q, k):
        shares = _attention(q, k, _values(chosen, k.shape[2], q.dtype, q.device), scale)
        shares = shares.float() if each_head else shares.sum(1, keepdim=True, dtype=torch.float32)
        return shares[..., : len(chosen)].transpose(-1, -2)
    columns, members = columns_of(chosen, q.device)
    parts = []
    for logits in logit_chunks(q, k, mask, scale, most):
        mass = logits.softmax(-1)[..., columns]
        if mask is not None:
            mass = mass.nan_to_num()  # queries without any key
        if not each_head:
            mass = mass.sum(1, keepdim=True)
        parts.append((mass @ members.to(mass.dtype)).transpose(-1, -2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@functools.lru_cache(maxsize=256)
def columns_of(groups: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all groups' keys [T], and which group each belongs to as 0 and 1 [T, W].

    Copied to the device once: a copy per attention call would wait for the GPU each time.
    """
    owners = [i for i, group in enumerate(groups) for _ in group]
    with torch.inference_mode(False):
        columns = torch.tensor([j for group in groups for j in group], dtype=torch.long)
        members = torch.zeros(len(owners), len(groups))
        members[range(len(owners)), owners] = 1
        return columns.to(device), members.to(device)


def _has_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether torch's memory-efficient attention takes these queries and keys."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or torch.version.hip:
        return False
    return q.shape[-1] % _ALIGNED == 0 and q.stride(-1) == k.stride(-1) == 1


def _attention(q: Tensor, k: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Return attention to values [Nk, Dv] that all heads share, [B, H, Nq, Dv]."""
    v = values.expand(*k.shape[:2], -1, -1)
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, False, scale=scale
    )[0]
    return out


@functools.lru_cache(maxsize=256)
def _values(
    groups: tuple[tuple[int, ...], ...], keys: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return which group each key belongs to as 0 and 1, [keys, groups and padding]."""
    with torch.inference_mode(False):
        values = torch.zeros(keys, -(-len(groups) // _ALIGNED) * _ALIGNED)
        for i, group in enumerate(groups):
            for j in group:
                values[j, i] += 1
        return values.to(device, dtype)
