"""Signed distances of the six shapes: negative inside, in units of the point coordinates.

Each function takes a point's offset from the centre, ``x`` and ``y`` (y downwards), and the
radius ``r``; all broadcast. Sizes are chosen so that the six look about equally large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Disc of radius ``0.95 r``."""
    return torch.hypot(x, y) - 0.95 * r


def box(x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Axis-parallel box of half sides ``width`` and ``height``."""
    dx, dy = x.abs() - width, y.abs() - height
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0)


def square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Square of half side ``0.82 r``."""
    return box(x, y, 0.82 * r, 0.82 * r)


def triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral triangle, point up, of circumradius ``1.12 r``, moved down to look centred."""
    y = y - 0.2 * r
    side = 0.8660254 * x.abs() - 0.5 * y
    return torch.maximum(side, y) - 0.56 * r


def diamond(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Square standing on a corner, half diagonal ``1.1 r``."""
    return (x.abs() + y.abs() - 1.1 * r) * 0.70710678


def ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Ring with outer radius ``r`` and inner radius ``0.5 r``."""
    return (torch.hypot(x, y) - 0.75 * r).abs() - 0.25 * r


def cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Plus sign with arms of half width ``0.3 r`` and length ``r``."""
    return torch.minimum(box(x, y, r, 0.3 * r), box(x, y, 0.3 * r, r))


DISTANCES: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    circle,
    square,
    triangle,
    diamond,
    ring,
    cross,
)
