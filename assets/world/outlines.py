"""Outlines of the six shapes as polygons, the same shapes that `shapes` draws."""

from __future__ import annotations

import math
from collections.abc import Callable

Point = tuple[float, float]
CORNERS = 48


def outline(shape: str, x: float, y: float, radius: float) -> list[Point]:
    """Corners of an object, in order; a ring's hole is joined to its rim by a slit.

    Args:
        shape: one of `palette.SHAPES`.
        x: centre, in any unit.
        y: centre, downwards.
        radius: in the same unit.
    """
    return [(x + radius * u, y + radius * v) for u, v in UNIT[shape]()]


def box(corners: list[Point]) -> tuple[float, float, float, float]:
    """Left, top, width and height of the smallest box around them."""
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def area(corners: list[Point]) -> float:
    """Area inside, by the shoelace formula."""
    following = [*corners[1:], corners[0]]
    twice = (a * d - b * c for (a, b), (c, d) in zip(corners, following, strict=True))
    return abs(sum(twice)) / 2


def _round(radius: float) -> list[Point]:
    angles = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _circle() -> list[Point]:
    return _round(0.95)


def _square() -> list[Point]:
    return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]


def _triangle() -> list[Point]:
    half = 0.84 / 0.8660254
    return [(0.0, -0.92), (half, 0.76), (-half, 0.76)]


def _diamond() -> list[Point]:
    return [(0.0, -1.1), (1.1, 0.0), (0.0, 1.1), (-1.1, 0.0)]


def _ring() -> list[Point]:
    rim, hole = _round(1.0), _round(0.5)
    return [*rim, rim[0], hole[0], *reversed(hole)]


def _cross() -> list[Point]:
    quarter = [(0.3, -1.0), (0.3, -0.3), (1.0, -0.3)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-v, u) for u, v in quarter]
    return corners


UNIT: dict[str, Callable[[], list[Point]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
}
