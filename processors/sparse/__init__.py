"""Sparse attention for long videos: fewer keys per query, chosen before the model runs."""

from .radial import Radial

__all__ = ["Radial"]
