"""Which heads a control takes, and putting their new output into the whole one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnctl.records import AttentionCall

__all__ = ["head_indices", "is_added_branch", "put", "writable"]


def is_added_branch(call: AttentionCall) -> bool:
    """Whether this is a further primitive of a site, with keys of its own (an IP-Adapter's)."""
    return call.index > 0 and call.q.shape[2] != call.k.shape[2]


def head_indices(call: AttentionCall) -> Tensor | None:
    """Return the indices of the selected heads on the call's device; None for all heads."""
    chosen = tuple(call.heads.tolist())
    return None if all(chosen) else _indices(chosen, call.q.device)


@functools.lru_cache(maxsize=1024)
def _indices(chosen: tuple[bool, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a copy per attention call would wait for the GPU each time."""
    with torch.inference_mode(False):
        return torch.tensor([i for i, on in enumerate(chosen) if on], device=device)


def writable(out: Tensor, call: AttentionCall) -> Tensor:
    """Return `out`, or a copy where writing into it would reach more than this output.

    A control further in may have returned q, k or v themselves, or an expanded tensor; and
    autograd may still need the old values.
    """
    shared = {t.untyped_storage().data_ptr() for t in (call.q, call.k, call.v)}
    alias = out.untyped_storage().data_ptr() in shared
    return out.clone() if alias or out.requires_grad or 0 in out.stride() else out


def put(
    out: Tensor, new: Tensor, rows: slice, heads: Tensor | None, call: AttentionCall
) -> Tensor:
    """Return `out` with some rows and heads replaced, in place where that is safe.

    Args:
        out: [B, H, N, D].
        new: [b, h, N, D].
        rows: the b rows.
        heads: indices [h] of the heads, None for all.
        call: the call that `out` answers.
    """
    out = out.clone() if new.requires_grad else writable(out, call)
    if heads is None:
        out[rows] = new
    else:
        out[rows].index_copy_(1, heads, new)
    return out
