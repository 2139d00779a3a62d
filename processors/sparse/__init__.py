"""Sparse attention for long videos: fewer keys per query, chosen before the model runs."""

from .block_sparse import BlockSparse
from .radial import Radial

__all__ = ["BlockSparse", "Radial"]
