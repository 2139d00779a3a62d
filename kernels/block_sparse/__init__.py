"""Attention over the kept blocks of a mask."""

from .api import block_sparse_attention, block_sparse_backend
from .mask import BlockMask
from .streaming import streaming_mask
from .windows import TileOrder, Window, window_mask

__all__ = [
    "BlockMask",
    "TileOrder",
    "Window",
    "block_sparse_attention",
    "block_sparse_backend",
    "streaming_mask",
    "window_mask",
]
