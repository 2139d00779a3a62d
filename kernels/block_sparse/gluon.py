"""Block-sparse attention forward by the warp-specialised kernel for Hopper."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from .mask import BlockMask
from .reference import block_sparse_reference
from .tiles import gluon_stages

__all__ = ["block_sparse_gluon", "why_not"]

_BLOCK = 128
WIDTHS = (64, 128)
"""Head dims of keys and values."""
OPTIONS = {"num_warps": 4, "maxnreg": 168}
"""Warps of the first consumer, and registers of a thread at launch (of 12 warps in all)."""


def constants(width: int, parts: bool) -> dict[str, Any]:
    """Return what the kernel is compiled for.

    Args:
        width: head dim.
        parts: whether the mask has partial blocks.
    """
    # 240 registers for the second consumer; the first gets what is left, as many
    stages = gluon_stages()[width]
    return {"BLOCK": _BLOCK, "D": width, "PARTS": parts, "STAGES": stages, "REGISTERS": 240}


def block_sparse_gluon(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and LSE; arguments and results as in `block_sparse_reference`.

    Args:
        q: [B, H, Nq, D], D 64 or 128.
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        mask: kept blocks of 128, on the device of q.
        scale: factor on the logits.
    """
    from .gluon_kernel import block_sparse_gluon_kernel

    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (x if _describable(x) else x.contiguous() for x in (q, k, v))
    batch, heads, n_q, width = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    ptr = mask.lists.ptr
    list_b = 0 if ptr.shape[0] == 1 else ptr.stride(0)
    list_h = 0 if ptr.shape[1] == 1 else ptr.stride(1)
    block_sparse_gluon_kernel[(mask.rows * heads * batch,)](
        _descriptor(q, _BLOCK // 2), _descriptor(k, _BLOCK), _descriptor(v, _BLOCK), out, lse,
        ptr, mask.lists.idx, mask.parts.ptr, mask.parts.idx, mask.part_bits, mask.bits,
        mask.order,
        *out.stride()[:3], list_b, list_h, heads, heads // k.shape[1], mask.rows,
        n_q, k.shape[2], scale * math.log2(math.e),
        **constants(width, len(mask.parts.idx) > 0), **OPTIONS,
    )  # fmt: skip
    return out, lse


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Return why the kernel cannot take these tensors, None if it can."""
    if q.device.type != "cuda":
        return f"it needs a CUDA device, got tensors on {q.device.type}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major != 9:
        return f"it is for Hopper (sm90), this GPU is sm{major}{minor}"
    if mask.block != _BLOCK:
        return f"it takes blocks of {_BLOCK}, got {mask.block}"
    # a constant where torch.compile traces any shape; it reads no file there either
    width = next((w for w in WIDTHS if w == q.shape[-1]), None)
    if width is None or v.shape[-1] != width:
        return (
            f"it takes head dim 64 or 128 for keys and values, got {q.shape[-1]} and {v.shape[-1]}"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, got {q.dtype}"
    return _fails(q.device.index, q.dtype, width)


@torch.compiler.assume_constant_result
def _fails(device: int, dtype: torch.dtype, width: int) -> str | None:
    """Return what the probe says, as a constant where torch.compile traces."""
    return _probe(device, dtype, width)


@functools.cache
def _probe(device: int, dtype: torch.dtype, width: int) -> str | None:
    """Return why the kernel fails on a small problem, None if its result is right.

    Gluon is experimental: what compiles with one Triton need not with the next.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'attnctl[kernels]')"
    try:
        generator = torch.Generator().manual_seed(0)
        made = torch.randn(3, 1, 1, 200, width, generator=generator)
        q, k, v = made.to(f"cuda:{device}", dtype)
        mask = BlockMask.of_blocks(torch.tensor([[True, True], [False, True]]), 200, 200)
        mask = mask.to(q.device)
        out, lse = block_sparse_gluon(q, k, v, mask, width**-0.5)
        want, want_lse = block_sparse_reference(q, k, v, mask, width**-0.5)
        close = torch.allclose(out.float(), want.float(), atol=2e-2, rtol=2e-2)
        right = close and torch.allclose(lse, want_lse, atol=1e-3)
    except Exception as error:  # whatever an experimental compiler raises
        return f"its kernel does not compile here ({type(error).__name__}: {str(error)[:200]})"
    return None if right else "its result on a small problem is wrong here"


def _descriptor(x: Tensor, rows: int) -> Any:
    """Return how the copy engine finds [1, 1, rows, D] tiles of a tensor."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape = [1, 1, rows, x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


def _describable(x: Tensor) -> bool:
    """Whether the copy engine can address a tensor: unit last stride, the others in 16 bytes."""
    size = x.element_size()
    steps = all(s > 0 and s * size % 16 == 0 for s in x.stride()[:3])
    return x.stride(-1) == 1 and steps and x.data_ptr() % 16 == 0
