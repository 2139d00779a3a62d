"""Masks from a table that says of each block whether it is full, or which bitmap it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .lists import RowLists, check_block
from .mask import BlockMask

__all__ = ["EMPTY", "FULL", "mask_of_kinds", "pack"]

EMPTY, FULL = -1, -2


def mask_of_kinds(
    kinds: Tensor, bitmaps: Callable[[Tensor], Tensor], n: int, block: int
) -> BlockMask:
    """Return the mask of a table of blocks.

    Args:
        kinds: int64 [R, C]: -1 for a block that is not kept, -2 for a full one, any other
            number for a partial one; blocks with the same number share a bitmap.
        bitmaps: numbers [n] -> bool [n, block, block].
        n: tokens, queries and keys alike.
        block: size of a block.
    """
    check_block(block)
    part = (kinds != EMPTY) & (kinds != FULL)
    numbers, which = kinds[part].unique(return_inverse=True)
    tiles = bitmaps(numbers)
    mask = BlockMask(
        n, n, block,
        RowLists.of((kinds == FULL)[None, None]), RowLists.of(part[None, None]),
        which.to(torch.int32), pack(tiles),
    )  # fmt: skip
    mask.check()
    return mask


def pack(tiles: Tensor) -> Tensor:
    """Return bool tiles [n, block, block] as int32 words [n, block, block / 32]."""
    weights = torch.ones(32, dtype=torch.int64) << torch.arange(32)
    words = (tiles.unflatten(-1, (tiles.shape[-1] // 32, 32)) * weights).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
