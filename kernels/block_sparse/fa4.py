"""Block-sparse attention by FlashAttention-4's kernels (the flash-attn-4 package)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .lists import RowLists
from .mask import BlockMask

__all__ = ["block_sparse_fa4", "why_not"]

_BLOCK = 128
_TABLES: Any = WeakTensorKeyDictionary()
"""Counts and padded indices, with the starts they belong to, by the entries of the lists."""


def block_sparse_fa4(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and LSE; arguments and results as in `block_sparse_reference`.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        mask: blocks of 128, none of them partial, on the device of q.
        scale: factor on the logits.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    counts, indices = _tables(mask.lists)
    none = torch.zeros_like(counts), indices[..., :1].contiguous()
    blocks = BlockSparseTensorsTorch(*none, counts, indices, block_size=(_BLOCK, _BLOCK))
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _flash_attn_fwd(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale, block_sparse_tensors=blocks, out=out.transpose(1, 2), lse=lse,
    )  # fmt: skip
    return out, lse


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Return why FlashAttention-4 cannot take these tensors, None if it can."""
    if not _installed():
        return "flash_attn.cute cannot be imported (pip install flash-attn-4)"
    if q.device.type != "cuda":
        return f"it needs a CUDA device, got tensors on {q.device.type}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major != 9:
        return f"it is used on Hopper (sm90) alone, this GPU is sm{major}{minor}"
    if mask.block != _BLOCK or len(mask.parts.idx):
        return (
            f"it takes full blocks of {_BLOCK}, got blocks of {mask.block}, "
            f"{len(mask.parts.idx)} of them partial"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in (64, 128) or v.shape[-1] != q.shape[-1]:
        return (
            f"it takes head dim 64 or 128 for keys and values, got {q.shape[-1]} and {v.shape[-1]}"
        )
    return None


def _installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn at all
        return False


def _tables(lists: RowLists) -> tuple[Tensor, Tensor]:
    """Return the counts [B, H, R] and the columns [B, H, R, longest row], both int32."""
    known = _TABLES.get(lists.idx)
    if known is None or known[0] is not lists.ptr:
        counts = lists.counts.contiguous()
        known = _TABLES[lists.idx] = lists.ptr, counts, _padded(lists, counts)
    return known[1], known[2]


def _padded(lists: RowLists, counts: Tensor) -> Tensor:
    """Return each row's columns, zeros behind them."""
    longest = max(1, int(counts.max()))
    out = torch.zeros(*counts.shape, longest, dtype=torch.int32, device=counts.device)
    begins = lists.ptr[..., :-1].flatten().long()
    entries = torch.arange(len(lists.idx), device=counts.device)
    out.view(-1, longest)[lists.owners, entries - begins[lists.owners]] = lists.idx
    return out
