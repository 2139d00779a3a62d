"""`block_sparse_attention`: checks, choice of the backend, layouts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from . import fa4, flex, gluon, ops
from .mask import BlockMask

__all__ = ["BACKENDS", "block_sparse_attention", "block_sparse_backend"]

WhyNot = Callable[[Tensor, Tensor, Tensor, BlockMask], "str | None"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    layout: Literal["bhnd", "bnhd"] = "bhnd",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v over the kept blocks of a mask.

    Args:
        q: [B, H, Nq, D], or [B, Nq, H, D] with `layout="bnhd"`.
        k: [B, Hkv, Nk, D]; H is a multiple of Hkv (grouped-query attention).
        v: [B, Hkv, Nk, Dv].
        mask: kept blocks; on another device it is copied once and remembered.
        scale: factor on the logits, None for 1/sqrt(D).
        layout: order of the dimensions, of the output too.
        return_lse: whether to return the log-sum-exp as well.
        backend: "reference" (any device), "gluon" (Hopper GPUs, blocks of 128, head dim 64 or
            128, 16 bits), "triton" (NVIDIA GPUs from sm80), "flex" (FlexAttention), "fa4"
            (FlashAttention-4 if installed; Hopper, full blocks of 128), or "auto": what
            `block_sparse_backend` says.

    Returns:
        The output, in the layout and dtype of q; with `return_lse` also the natural
        log-sum-exp [B, H, Nq] in float32 (float64 for float64 inputs). A query without any
        kept key gives output 0 and LSE -inf. Gradients of all backends but "flex" come from
        the reference.

    Raises:
        ValueError: if shapes, dtypes, devices and mask do not fit, or if the backend asked for
            cannot run here; none is ever exchanged for another.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout={layout!r}: expected 'bhnd' or 'bnhd'")
    if layout == "bnhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    _check(q, k, v, mask)
    mask = mask.to(q.device)
    chosen = block_sparse_backend(q, k, v, mask, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "flex":
        out, lse = flex.block_sparse_flex(q, k, v, mask, scale)
    else:
        out, lse = ops.call(q, k, v, mask, scale, chosen)
    out = out.transpose(1, 2) if layout == "bnhd" else out
    return (out, lse) if return_lse else out


def block_sparse_backend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, backend: str = "auto"
) -> str:
    """Return the backend that serves a call.

    "auto" takes gluon, then triton, then flex on a GPU, and the reference elsewhere.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: kept blocks.
        backend: "auto", or one by name.

    Raises:
        ValueError: on an unknown name, or why the named one cannot run here.
    """
    if backend == "auto":
        if q.device.type != "cuda":
            return "reference"
        return next(name for name, why in BACKENDS.items() if why(q, k, v, mask) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend](q, k, v, mask)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {reason}; 'auto' takes another")
    return backend


def _never(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """The reference runs everywhere."""
    return None


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Return why the Triton kernel cannot take these tensors, None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'attnctl[kernels]')"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 or float32, got {q.dtype}"
    if v.shape[-1] != q.shape[-1] or not 16 <= q.shape[-1] <= 256:
        return (
            "it takes one head dim of 16 to 256 for keys and values, got "
            f"{q.shape[-1]} and {v.shape[-1]}"
        )
    if q.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        return None if major >= 8 else f"it needs sm80 or newer, this GPU is sm{major}{minor}"
    return None if _interpreted() else f"it needs a CUDA device, got tensors on {q.device.type}"


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    from .triton import INTERPRETED

    return INTERPRETED


BACKENDS: dict[str, WhyNot] = {
    "gluon": gluon.why_not,
    "triton": _why_not_triton,
    "flex": flex.why_not,
    "fa4": fa4.why_not,
    "reference": _never,
}
"""Why each backend cannot take a call (None if it can), in the order in which auto tries them."""


def _shapes(*qkv: Tensor) -> str:
    """Return shapes for a message; torch.compile cannot write those of any length."""
    return ", ".join(f"{name} {list(x.shape)}" for name, x in zip("qkv", qkv, strict=True))


def _check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    """Refuse tensors that do not fit each other or the mask."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"expected four dimensions each, got {_shapes(q, k, v)}")
    batch, heads, nq, width = q.shape
    same = k.shape[0] == v.shape[0] == batch and k.shape[1:3] == v.shape[1:3]
    if not same or k.shape[3] != width or heads % k.shape[1]:
        raise ValueError(
            "expected q [B, H, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] with H a multiple "
            f"of Hkv, got (as [B, H, N, D]) {_shapes(q, k, v)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"expected one dtype and device, got {q.dtype} on {q.device}, {k.dtype} on "
            f"{k.device}, {v.dtype} on {v.device}"
        )
    if (mask.nq, mask.nk) != (nq, k.shape[2]):
        raise ValueError(
            f"the mask is for {mask.nq} queries and {mask.nk} keys, got {nq} and {k.shape[2]}"
        )
    if mask.batch not in (1, batch) or mask.heads not in (1, heads):
        raise ValueError(
            f"the mask has lists for {mask.batch} batch entries and {mask.heads} heads, expected "
            f"1 or {batch}, and 1 or {heads}"
        )
