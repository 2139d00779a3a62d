"""Block-sparse attention by torch's FlexAttention."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from .mask import BlockMask

__all__ = ["block_sparse_flex", "why_not"]

_MASKS: weakref.WeakKeyDictionary[BlockMask, Any] = weakref.WeakKeyDictionary()


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Return why FlexAttention cannot take these tensors, None if it can."""
    try:
        import torch.nn.attention.flex_attention
    except ImportError:
        return f"torch {torch.__version__} has no FlexAttention"
    if q.device.type == "cuda" and mask.block < 64:
        return f"compiled FlexAttention is not used for blocks of {mask.block}, only from 64"
    return None


def block_sparse_flex(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and LSE; compiled on a GPU, FlexAttention's own eager form on a CPU.

    The eager form makes the whole map, so it is for small sizes. Arguments and results are
    those of `block_sparse_reference`.
    """
    if mask not in _MASKS:
        _MASKS[mask] = mask.to_flex()
    out, lse = _attention(q.device.type == "cuda")(
        q, k, v, block_mask=_MASKS[mask], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out, lse


@functools.cache
def _attention(compiled: bool) -> Any:
    from torch.nn.attention import flex_attention as flex

    attention: Any = flex.flex_attention
    if compiled:
        attention = torch.compile(attention, dynamic=False)
    if not hasattr(flex, "AuxRequest"):  # before torch 2.9
        return functools.partial(attention, return_lse=True)
    request = flex.AuxRequest(lse=True)

    def with_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, aux = attention(*args, return_aux=request, **kwargs)
        return out, aux.lse

    return with_lse
