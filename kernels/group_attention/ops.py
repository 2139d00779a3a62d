"""The edited row of a written token as one operator, for code that torch.compile makes.

Eager code starts the kernel directly (`api`). In a compiled decoder the operator costs nothing on
the host: it becomes a node of the CUDA graph. What changes from prompt to prompt is read from
tensors, so that a graph serves them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .api import edited_row
from .edit import Edit
from .reference import edited_row_reference

__all__ = ["COUNTS", "call"]

COUNTS = 512
"""Counts that a launch may need."""


@torch.library.custom_op("attnctl::edited_row", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    codes: Tensor,
    heads: Tensor | None,
    counts: Tensor,
    strength: float,
    move: bool,
    rho: float,
    least: float,
    scale: float,
) -> Tensor:
    edit = Edit(codes, strength, move, rho, least, heads)
    row = edited_row(q, k, v, edit, mask, scale, counts)
    return edited_row_reference(q, k, v, edit, mask, scale) if row is None else row


@_operator.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    codes: Tensor,
    heads: Tensor | None,
    counts: Tensor,
    numbers: tuple[float, bool, float, float],
    scale: float | None,
) -> Tensor:
    """Return the attention of single queries with their weights edited, [B, 1, H, Dv].

    Args:
        q: [B, H, 1, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: bool (True = may attend) or additive float [B or 1, H or 1, 1, Nk], None for none.
        codes: uint8 [B, P] of the first keys; the others have code 0.
        heads: uint8 [H], not 0 at the heads to edit; None for all.
        counts: int32 [COUNTS], 0 before and after: what the parts of a split row are
            counted in. It outlives the graph, and launches of one stream may share it.
        numbers: strength, move, rho and least of an `Edit`.
        scale: factor on the logits, None for 1/sqrt(D).
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out: Tensor = _operator(q, k, v, mask, codes, heads, counts, *numbers, scale)
    return out
