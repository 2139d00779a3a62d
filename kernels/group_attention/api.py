"""The Triton kernels where they can run: on NVIDIA GPUs from sm80 on, without a gradient.

Elsewhere the callers take the torch path, which is their reference. The kernels are started
directly and not through operators of torch: at one token a time the time goes into starting
work, of which an operator would double the amount. Compiled decoders have one (`ops`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnctl.kernels.devices import kernels_on

from .edit import DTYPES, Edit, Rows

__all__ = [
    "Shared",
    "codes_call",
    "edit_rows",
    "edited_row",
    "rows_fit",
]


_TRITON = f"{__package__}.triton"


def _graph_wanted(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class Shared:
    """What the layers of a forward share of the launches of one edit.

    Args:
        total: tokens so far.
    """

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.again: Any = None  # edits the rows of another layer (`again.RowsAgain`)


def rows_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `edited_row` and `edit_rows` can take such a call.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: as of scaled_dot_product_attention.
    """
    kernels = kernels_on(q.device, _TRITON)
    if kernels is None or _graph_wanted(q, k, v):
        return False
    fit: bool = kernels.tensors_fit(q, k, v, mask)
    return fit


def edited_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edit: Edit,
    mask: Tensor | None,
    scale: float | None,
    counts: Tensor | None = None,
    shared: Shared | None = None,
) -> Tensor | None:
    """Return the attention of single queries with their weights edited.

    Args:
        q: [B, H, 1, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        edit: the edit.
        mask: bool (True = may attend) or additive float [B or 1, H or 1, 1, Nk], None for none.
        scale: factor on the logits, None for 1/sqrt(D).
        counts: int32, 0 before and after, to count parts in; None for those of the stream.
        shared: told how the layers after this one are edited.

    Returns:
        [B, 1, H, D]; None where the kernel cannot take the call.
    """
    call = _call(q, k, v, edit, None, mask, scale, False)
    if call is None:
        return None
    done = _first(call, q, k, v, None, edit, None, mask, scale, False, shared)
    if done is not None:
        return done
    batch, heads, _, width = q.shape
    out = q.new_empty((batch, 1, heads, width))
    call(q, k, v, out, edit, None, mask, counts)
    return out


def edit_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    edit: Edit,
    rows: Rows,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    shared: Shared | None = None,
) -> bool:
    """Write the attention of some queries, with their weights edited, into that of all.

    Rows and heads that the edit leaves alone keep what `out` holds.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        out: [B, Nq, H, D], contiguous; changed in place.
        edit: the edit.
        rows: the queries.
        mask: bool (True = may attend) or additive float [B or 1, H or 1, Nq or 1, Nk].
        scale: factor on the logits, None for 1/sqrt(D).
        causal: whether query i sees the keys up to i only.
        shared: told how the layers after this one are edited.

    Returns:
        Whether the kernel can take the call (`rows_fit`); if not, nothing is changed.
    """
    if not rows.table.shape[1]:
        return True
    call = _call(q, k, v, edit, rows, mask, scale, causal)
    if call is None:
        return False
    if _first(call, q, k, v, out, edit, rows, mask, scale, causal, shared) is None:
        call(q, k, v, out, edit, rows, mask)
    return True


def _first(
    call: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, edit: Edit,
    rows: Rows | None, mask: Tensor | None, scale: float | None, causal: bool,
    shared: Shared | None,
) -> Tensor | None:  # fmt: skip
    """Edit the first layer as those after it will be; None where Triton must be asked."""
    if shared is None:
        return None
    total = shared.total
    shared.again = again = call.again(q, k, v, edit, rows, mask, scale, causal, total)
    if again is None:
        return None
    done: Tensor | None = again(q, k, v, out, edit.codes, edit.heads, mask, scale, causal, total)
    return done


def _call(
    q: Tensor, k: Tensor, v: Tensor, edit: Edit, rows: Rows | None, mask: Tensor | None,
    scale: float | None, causal: bool,
) -> Any:  # fmt: skip
    kernels = kernels_on(q.device, _TRITON)
    if kernels is None or _graph_wanted(q, k, v):
        return None
    return kernels.rows_call(q, k, v, edit, rows, mask, scale, causal)


def codes_call(
    hidden: Tensor, dims: Tensor, labels: Tensor, tau: float, limit: int, layers: int = 1
) -> Any:
    """Return what writes the codes of tokens (`spikes.CodesCall`), None if that cannot be.

    Args:
        hidden: [B, N, width], what the first layer reads.
        dims: the sink dimensions, a tensor of whole numbers.
        labels: uint8 [B, N]: 0 text, 1 image, 2 padding, 3 image tokens that are never sinks.
        tau: least phi of a sink.
        limit: tokens from this one on are never sinks.
        layers: how many layers will ask for codes.
    """
    kernels = kernels_on(hidden.device, _TRITON)
    if kernels is None or hidden.dtype not in DTYPES or hidden.stride(2) != 1:
        return None
    return kernels.CodesCall(hidden, dims, labels, tau, limit, layers)
