"""Attention over the kept blocks of a mask."""

from .api import block_sparse_attention, block_sparse_backend
from .mask import BlockMask

__all__ = ["BlockMask", "block_sparse_attention", "block_sparse_backend"]
