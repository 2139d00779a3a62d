"""Attention over groups of keys, exact, in plain torch on any device.

An edit that scales the softmax weights of a few disjoint groups of keys by one factor per row
and head needs no map over all queries: with m_g the mass of group g and o_g attention within it,

    out' = sum_g c_g m_g o_g,

and what decides the factors c_g (how much attention the image gets, say) is the masses. Groups
are masks [B, G, P] over the first P keys; keys in no group keep their weight. Key and value
heads are never repeated for grouped queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnctl.kernels.lse.reference import query_chunks

from .edit import Edit
from .redistribution import reads_image, redistribution

__all__ = [
    "edited_row_reference",
    "group_attention",
    "group_masses",
    "merge_groups",
    "regrouped_attention",
    "row_probabilities",
]


def row_probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return the softmax weights of some rows, all at once: for few queries.

    Args:
        q: [B, H, R, D], the rows.
        k: [B, Hkv, Nk, D], H a multiple of Hkv.
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, R, Nk].
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        softmax(scale q k^T + mask), [B, H, R, Nk] in float32 (float64 for float64 inputs).
    """
    return torch.softmax(_logits(q, k, mask, scale), dim=-1)


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    batch, heads, rows, width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale
    grouped = (q.to(wide) * scale).reshape(batch, k.shape[1], -1, width)
    logits = (grouped @ k.to(wide).transpose(-1, -2)).view(batch, heads, rows, -1)
    return _masked(logits, mask)


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask


def _values(weights: Tensor, v: Tensor) -> Tensor:
    """Return weights [B, H, R, Nk] times values [B, Hkv, Nk, Dv], in the dtype of the values."""
    batch, heads, rows, keys = weights.shape
    grouped = weights.to(v.dtype).reshape(batch, v.shape[1], -1, keys)
    return (grouped @ v).view(batch, heads, rows, -1)


def group_masses(
    q: Tensor, k: Tensor, groups: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return how much attention each row gives to each group of keys.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        groups: [B or 1, G, P] masks over the first P keys (bool, or 0 and 1).
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        [B, H, Nq, G] in float32 (float64 for float64 inputs), in chunks of queries.
    """
    parts = []
    for rows in query_chunks(q, k.shape[2]):
        weights = row_probabilities(q[:, :, rows], k, _rows(mask, rows), scale)
        parts.append(_mass(weights, groups))
    return torch.cat(parts, dim=2)


def _mass(weights: Tensor, groups: Tensor) -> Tensor:
    member = groups.to(weights.dtype).transpose(-1, -2)[:, None]
    return weights[..., : groups.shape[-1]] @ member


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention within each group of keys, and its log-sum-exp.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        groups: [B or 1, G, Nk] masks over the keys (bool, or 0 and 1).
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        Outputs [G, B, H, Nq, Dv] in the dtype of q, 0 where a row sees no key of the group, and
        log-sum-exps [G, B, H, Nq] in float32 (float64 for float64 inputs), -inf there.
    """
    outs, lses = [], []
    for rows in query_chunks(q, k.shape[2]):
        logits = _logits(q[:, :, rows], k, _rows(mask, rows), scale)
        parts = [_within(logits, v, one) for one in groups.bool().unbind(1)]
        outs.append(torch.stack([out for out, _ in parts]))
        lses.append(torch.stack([lse for _, lse in parts]))
    return torch.cat(outs, dim=3), torch.cat(lses, dim=3)


def _within(logits: Tensor, v: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    inside = logits.masked_fill(~group[:, None, None], -torch.inf)
    lse = torch.logsumexp(inside, dim=-1)
    finite = lse.clamp_min(torch.finfo(lse.dtype).min)  # rows without a key get weights of 0
    return _values(torch.exp(inside - finite[..., None]), v), lse


def merge_groups(outs: Tensor, lses: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return sum_g c_g m_g out_g, m_g the mass of group g among all of them.

    Args:
        outs: [G, B, H, Nq, Dv], of groups that cover every key once.
        lses: [G, B, H, Nq].
        factors: c [G, B, H, Nq], or None for 1: attention as it is.
    """
    masses = torch.softmax(lses, dim=0)
    weights = masses if factors is None else masses * factors
    total: Tensor = (weights[..., None] * outs.to(weights.dtype)).sum(0)
    return total.to(outs.dtype)


def regrouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    factors: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention whose weights are scaled group by group, all rows at once: for few.

    Args:
        q: [B, H, R, D], the rows.
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        groups: [B or 1, G, P] disjoint masks over the first P keys, 0 and 1 in a floating type.
        factors: maps the masses [B, H, R, G] to the groups' factors [B, H, R, G]; weights are
            not normalised again.
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, R, Nk].
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        The output [B, H, R, Dv] in the dtype of v, and the masses [B, H, R, G] before.
    """
    weights = row_probabilities(q, k, mask, scale)
    masses = _mass(weights, groups)
    change = (factors(masses) - 1) @ groups.to(weights.dtype)[:, None]
    rest = weights.shape[-1] - change.shape[-1]
    change = torch.nn.functional.pad(change, (0, rest)) if rest else change
    return _values(weights + weights * change, v), masses


def edited_row_reference(
    q: Tensor, k: Tensor, v: Tensor, edit: Edit, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Return the attention of single queries with their weights edited, as `edited_row` does.

    Args:
        q: [B, H, 1, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        edit: the edit.
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, 1, Nk].
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        [B, 1, H, Dv] in the dtype of v.
    """
    codes = edit.codes[:, edit.first : edit.first + k.shape[2]]
    free = q.new_ones(1, dtype=torch.bool) if edit.heads is None else edit.heads != 0
    if edit.move:
        wide = torch.promote_types(q.dtype, torch.float32)
        groups = torch.stack([codes == code for code in (1, 2, 3)], dim=1).to(wide)

        def factors(masses: Tensor) -> Tensor:
            chosen = reads_image(masses, edit.rho, edit.least) & free[:, None]
            return redistribution(masses, chosen, edit.strength)

        row, _ = regrouped_attention(q, k, v, groups, factors, mask, scale)
        return row.transpose(1, 2).contiguous()
    raised = torch.nn.functional.pad(codes == 1, (0, k.shape[2] - codes.shape[1]))
    where = raised[:, None, None] & free[:, None, None]
    logits = _logits(q, k, None, scale)
    logits = _masked(logits + torch.where(where, edit.strength * logits.abs(), 0.0), mask)
    return _values(torch.softmax(logits, dim=-1), v).transpose(1, 2).contiguous()
