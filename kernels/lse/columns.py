"""Sums of chosen columns of attention, added up over heads in one kernel, without the map.

For groups w of keys, with z the logits of all keys,

    sums[s, p, w, i] += sum over the heads h of part p, and over j in w, of exp(z_hij - lse_hi),
    lse_hi = log sum_j exp(z_hij)

A part is the heads p, p + P, p + 2 P, ...: with as many parts as heads each is by itself, with
fewer they only share the work. No part is written by two programs, so that sums are the same
bit for bit from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from attnctl.kernels.devices import kernels_on

__all__ = ["ColumnSums", "Columns", "column_sums", "parts_of"]

_TRITON = f"{__package__}.triton"
_PROGRAMS, _ROWS = 256, 64
"""Programs that fill a GPU, and the queries that one of them takes."""


class Columns(NamedTuple):
    """Which columns of a call are read, and where they go.

    Args:
        rows: of the batch.
        queries: which of them.
        heads: indices [h] of the query heads, None for all.
        keys: indices [T] of the keys.
        members: float32 [T, W], how often a key counts in a group.
        sums: float32 [S, P, W, N], contiguous, on the device of the queries.
        first: which of the S samples the first row is.
    """

    rows: slice
    queries: slice
    heads: Tensor | None
    keys: Tensor
    members: Tensor
    sums: Tensor
    first: int


ColumnSums = Callable[[Tensor, Tensor, "Tensor | None"], None]
"""Adds the columns of a call (q, k, mask), of the shapes, layouts and types it was made for."""


def parts_of(rows: int, queries: int, heads: int) -> int:
    """Return into how many parts heads are put so that the work fills a GPU."""
    blocks = max(1, rows * -(-queries // _ROWS))
    return max(1, min(heads, -(-_PROGRAMS // blocks)))


def column_sums(
    q: Tensor, k: Tensor, wanted: Columns, mask: Tensor | None = None, scale: float | None = None
) -> ColumnSums | None:
    """Return what adds the columns of calls like this one; None if the kernel does not take it.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        wanted: which columns, and where to.
        mask: bool (True = may attend) or additive float.
        scale: factor on the logits, None for 1/sqrt(D).
    """
    kernels = kernels_on(q.device, _TRITON)
    if kernels is None or not kernels.columns_fit(q, k, wanted, mask):
        return None
    made: ColumnSums = kernels.ColumnsCall(q, k, wanted, mask, scale)
    return made
