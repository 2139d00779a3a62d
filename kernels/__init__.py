"""Attention primitives: one operation per folder, a reference for any device in each."""

from .block_sparse import (
    BlockMask,
    TileOrder,
    Window,
    block_sparse_attention,
    block_sparse_backend,
    streaming_mask,
    window_mask,
)
from .lse import attention_with_lse, merge_attention

__all__ = [
    "BlockMask",
    "TileOrder",
    "Window",
    "attention_with_lse",
    "block_sparse_attention",
    "block_sparse_backend",
    "merge_attention",
    "streaming_mask",
    "window_mask",
]
