"""Block-sparse attention by torch's FlexAttention."""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from .build import to_flex
from .mask import BlockMask

__all__ = ["block_sparse_flex", "why_not"]

_SMALL_TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2}
"""With the bitmaps' rule its own choice of tiles needs more shared memory than an H100 has."""

_SHAPES = 256
"""Shapes and masks that may be compiled in one process."""

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
    compiled = q.device.type == "cuda"
    if mask not in _MASKS:  # one mask is on one device
        _MASKS[mask] = to_flex(mask, rule_of_full=not compiled)
    with _many_shapes() if compiled else contextlib.nullcontext():
        out, lse = _attention(compiled)(
            q, k, v, block_mask=_MASKS[mask], scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=_SMALL_TILES if compiled and len(mask.bits) else None,
        )  # fmt: skip
    return out, lse


def _many_shapes() -> Any:
    """Return a context in which a ninth shape compiles as well.

    By default torch.compile falls back to the eager form then, which makes the whole map.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=_SHAPES)


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
