"""Drawing of a block mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from .mask import BlockMask

__all__ = ["draw"]

_EMPTY, _FULL, _PART, _GAP = (244, 244, 240), (32, 60, 110), (238, 150, 60), (255, 255, 255)
_WIDTH = 360


def draw(mask: BlockMask, cell: int = 0) -> Image:
    """Return a picture: heads side by side, batch entries below one another.

    Args:
        mask: the mask.
        cell: pixels of a block, 0 for what makes a list about 360 pixels wide.
    """
    from PIL import Image

    if cell < 0:
        raise ValueError(f"cell={cell}: expected 0 or more pixels")
    cell = cell or max(1, round(_WIDTH / mask.cols))
    colours = torch.tensor([_EMPTY, _FULL, _PART], dtype=torch.uint8)
    kind = mask.lists.table(mask.cols).int() + 2 * mask.parts.table(mask.cols).int()
    tiles = colours[kind.cpu().long()].repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    batch, heads, high, wide, _ = tiles.shape
    gap = max(4, cell)
    sheet = torch.tensor(_GAP, dtype=torch.uint8).repeat(
        batch * (high + gap) - gap, heads * (wide + gap) - gap, 1
    )
    for b in range(batch):
        for h in range(heads):
            y, x = b * (high + gap), h * (wide + gap)
            sheet[y : y + high, x : x + wide] = tiles[b, h]
    return Image.fromarray(sheet.numpy())
