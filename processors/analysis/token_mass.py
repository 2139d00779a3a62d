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
    columns, members = _columns(tuple(map(tuple, groups)), q.device)
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
def _columns(groups: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all groups' keys [T], and which group each belongs to as 0 and 1 [T, W].

    Copied to the device once: a copy per attention call would wait for the GPU each time.
    """
    owners = [i for i, group in enumerate(groups) for _ in group]
    with torch.inference_mode(False):
        columns = torch.tensor([j for group in groups for j in group], dtype=torch.long)
        members = torch.zeros(len(owners), len(groups))
        members[range(len(owners)), owners] = 1
        return columns.to(device), members.to(device)
