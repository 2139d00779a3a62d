"""The Triton kernels where they can run: on NVIDIA GPUs from sm80 on, without a gradient.

Elsewhere the callers take the torch path, which is their reference. The kernels are started
directly and not through operators of torch: a patched decoder is never compiled, and at one
token a time the time goes into starting work, of which an operator would double the amount.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .edit import DTYPES, Edit, Rows

__all__ = [
    "codes_fit",
    "edit_rows",
    "edited_row",
    "rows_fit",
    "sink_codes",
    "with_edited_rows",
]


@functools.cache
def _kernels(device: torch.device) -> Any:
    """Return the module of the kernels, None where they cannot run."""
    try:
        found = importlib.import_module(".triton", __package__)
    except ImportError:
        return None
    if device.type == "cuda":
        usable = torch.version.cuda is not None
        usable = usable and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        usable = device.type == "cpu" and found.INTERPRETED
    return found if usable else None


def _graph_wanted(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def rows_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `edited_row` and `edit_rows` can take such a call.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: as of scaled_dot_product_attention.
    """
    kernels = _kernels(q.device)
    if kernels is None or _graph_wanted(q, k, v):
        return False
    fit: bool = kernels.tensors_fit(q, k, v, mask)
    return fit


def edited_row(
    q: Tensor, k: Tensor, v: Tensor, edit: Edit, mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """Return the attention of single queries with their weights edited.

    Args:
        q: [B, H, 1, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        edit: the edit.
        mask: bool (True = may attend) or additive float [B or 1, H or 1, 1, Nk], None for none.
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        [B, H, 1, D], a view of a tensor in the layout [B, 1, H, D]; None where the kernel cannot
        take the call.
    """
    call = _call(q, k, v, None, edit, None, mask, scale, False)
    if call is None:
        return None
    batch, heads, _, width = q.shape
    out = q.new_empty((batch, 1, heads, width))
    _start(call, q, k, v, out, edit, None, mask)
    return out.transpose(1, 2)


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
) -> None:
    """Write the attention of some queries, with their weights edited, into that of all.

    Rows and heads that the edit leaves alone keep what `out` holds.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        out: [B, H, Nq, D], unit stride last; changed in place.
        edit: the edit.
        rows: the queries.
        mask: bool (True = may attend) or additive float [B or 1, H or 1, Nq or 1, Nk].
        scale: factor on the logits, None for 1/sqrt(D).
        causal: whether query i sees the keys up to i only.

    Raises:
        ValueError: if the kernel cannot take the call (`rows_fit`).
    """
    if not rows.columns.shape[0]:
        return
    call = _call(q, k, v, out.stride()[:3], edit, rows, mask, scale, causal)
    if call is None:
        raise ValueError("the kernel cannot take this call: ask rows_fit first")
    _start(call, q, k, v, out, edit, rows, mask)


def with_edited_rows(
    stock: Callable[[], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edit: Edit,
    rows: Rows,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
) -> Tensor | None:
    """Return attention with some rows edited, from a function that computes it for all.

    Args:
        stock: returns the attention [B, Nq, H, D] of all queries.
        q: as in `edit_rows`, like the others.
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        edit: the edit.
        rows: the queries.
        mask: bool or additive float.
        scale: factor on the logits.
        causal: whether query i sees the keys up to i only.

    Returns:
        [B, Nq, H, D]; None, with `stock` not called, where the kernel cannot take the call.
    """
    if not rows.columns.shape[0]:
        return stock()
    call = _call(q, k, v, None, edit, rows, mask, scale, causal)
    if call is None:
        return None
    out = stock().contiguous()
    _start(call, q, k, v, out, edit, rows, mask)
    return out


def _call(
    q: Tensor, k: Tensor, v: Tensor, steps: Any, edit: Edit, rows: Rows | None,
    mask: Tensor | None, scale: float | None, causal: bool,
) -> Any:  # fmt: skip
    kernels = _kernels(q.device)
    if kernels is None or _graph_wanted(q, k, v):
        return None
    return kernels.rows_call(q, k, v, steps, edit, rows, mask, scale, causal)


def _start(call: Any, q: Tensor, *rest: Any) -> None:
    if _is_here(q):
        call(q, *rest)
        return
    with torch.cuda.device_of(q):
        call(q, *rest)


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _is_here(x: Tensor) -> bool:
    """Whether a kernel on this tensor can be started at once: it starts on the current GPU."""
    return not _several_gpus() or not x.is_cuda or x.device.index == torch.cuda.current_device()


def codes_fit(hidden: Tensor) -> bool:
    """Whether `sink_codes` can take such a residual stream [B, N, width]."""
    fits = hidden.dtype in DTYPES and hidden.stride(2) == 1
    return fits and _kernels(hidden.device) is not None


def sink_codes(
    hidden: Tensor,
    dims: Tensor,
    labels: Tensor,
    tau: float,
    limit: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return the codes uint8 [B, N] of tokens: 1 text sink, 2 image sink, 3 other image, else 0.

    Args:
        hidden: [B, N, width], what a layer reads.
        dims: the sink dimensions, a tensor of whole numbers.
        labels: uint8 [B, N]: 0 text, 1 image, 2 padding, 3 image tokens that are never sinks.
        tau: least phi of a sink.
        limit: tokens from this one on are never sinks.
        out: contiguous uint8 [B, N] to write them into; None for a new tensor.
    """
    if out is None:
        out = torch.empty(hidden.shape[:2], dtype=torch.uint8, device=hidden.device)
    find = _kernels(hidden.device).sink_codes_triton
    if _is_here(hidden):
        find(hidden, dims, labels, out, tau, limit)
        return out
    with torch.cuda.device_of(hidden):
        find(hidden, dims, labels, out, tau, limit)
    return out
