"""The share of attention that chosen keys get, without the map: exact softmax columns."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnctl.kernels.lse.reference import logit_chunks

__all__ = ["token_mass"]

_CHUNK_ELEMENTS = 1 << 22
"""Largest number of logits held at once: 16 MB."""


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
    columns = _columns(tuple(j for group in groups for j in group), q.device)
    parts = []
    for logits in logit_chunks(q, k, mask, scale, most):
        lse = torch.logsumexp(logits, dim=-1).clamp_min(torch.finfo(logits.dtype).min)
        columns_mass = torch.exp(logits[..., columns] - lse[..., None])
        if not each_head:
            columns_mass = columns_mass.sum(1, keepdim=True)
        split = columns_mass.split([len(group) for group in groups], dim=-1)
        parts.append(torch.stack([one.sum(-1) for one in split], dim=2))
    return torch.cat(parts, dim=-1)


@functools.lru_cache(maxsize=256)
def _columns(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a copy per attention call would wait for the GPU each time."""
    with torch.inference_mode(False):
        return torch.tensor(indices, dtype=torch.long, device=device)
