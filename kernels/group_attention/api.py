"""The Triton kernels where they can run: on NVIDIA GPUs from sm80 on, without a gradient.

Elsewhere the callers take the torch path, which is their reference. The kernels are started
directly and not through operators of torch: a patched decoder is never compiled, and at one
token a time the time goes into starting work, of which an operator would double the amount.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .edit import Edit, Rows

__all__ = ["codes_fit", "edit_rows", "edited_row", "rows_fit", "sink_codes"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    if q.dtype not in _DTYPES or q.shape[3] > 256 or v.shape[3] != q.shape[3]:
        return False
    if not q.dtype == k.dtype == v.dtype or q.stride(3) + k.stride(3) + v.stride(3) != 3:
        return False
    if mask is not None and (mask.ndim != 4 or mask.stride(3) != 1 or mask.shape[3] != k.shape[2]):
        return False
    return _kernels(q.device) is not None and not _graph_wanted(q, k, v)


def edited_row(
    q: Tensor, k: Tensor, v: Tensor, edit: Edit, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Return the attention of single queries with their weights edited.

    Args:
        q: [B, H, 1, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        edit: the edit.
        mask: bool (True = may attend) or additive float [B or 1, H or 1, 1, Nk], None for none.
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        [B, H, 1, D]; a view of a tensor in the layout [B, 1, H, D].
    """
    batch, heads, _, width = q.shape
    out = q.new_empty((batch, 1, heads, width)).transpose(1, 2)
    _run(q, k, v, out, edit, None, mask, scale, False)
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
    """
    if rows.columns.shape[0]:
        _run(q, k, v, out, edit, rows, mask, scale, causal)


def _run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, edit: Edit, rows: Rows | None,
    mask: Tensor | None, scale: float | None, causal: bool,
) -> None:  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else scale
    launch = _kernels(q.device).edited_rows_triton
    if not q.is_cuda or q.device.index == torch.cuda.current_device():
        launch(q, k, v, out, edit, rows, mask, scale, causal)
        return
    with torch.cuda.device_of(q):  # a kernel starts on the current GPU
        launch(q, k, v, out, edit, rows, mask, scale, causal)


def codes_fit(hidden: Tensor) -> bool:
    """Whether `sink_codes` can take such a residual stream [B, N, width]."""
    fits = hidden.dtype in _DTYPES and hidden.stride(2) == 1
    return fits and _kernels(hidden.device) is not None


def sink_codes(hidden: Tensor, dims: Tensor, labels: Tensor, tau: float, limit: int) -> Tensor:
    """Return the codes uint8 [B, N] of tokens: 1 text sink, 2 image sink, 3 other image, else 0.

    Args:
        hidden: [B, N, width], what a layer reads.
        dims: the sink dimensions, a tensor of whole numbers.
        labels: uint8 [B, N]: 0 text, 1 image, 2 padding, 3 image tokens that are never sinks.
        tau: least phi of a sink.
        limit: tokens from this one on are never sinks.
    """
    from .spikes import sink_codes_triton

    with torch.cuda.device_of(hidden):
        return sink_codes_triton(hidden, dims, labels, tau, limit)
