"""Curves on logarithmic axes, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from attnctl.apps.lettering import lettering

__all__ = ["Curve", "Panel", "curves"]

_HIGH, _WIDE, _LEFT, _EDGE, _SIZE = 320, 400, 56, 24, 13
_PAPER, _INK, _FAINT = (255, 255, 255), (0, 0, 0), (215, 215, 215)
_COLOURS = (
    (90, 90, 90),
    (200, 60, 40),
    (30, 90, 170),
    (40, 140, 70),
    (150, 90, 170),
    (200, 140, 0),
)


@dataclass(frozen=True)
class Curve:
    """Points (x, y), both above 0, under one name; joined by lines or not."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """Curves on the same axes, with the names of the axes."""

    x: str
    y: str
    lines: Sequence[Curve]


def curves(title: str, panels: Sequence[Panel]) -> Image.Image:
    """Return panels side by side, both axes logarithmic, one legend for all.

    Args:
        title: first line.
        panels: the panels; a name has the same colour in each.
    """
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    top = 3 * _SIZE * 3 // 2
    sheet = Image.new("RGB", (len(panels) * (_LEFT + _WIDE + _EDGE), top + _HIGH + 56), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font, (title, *shown) = lettering(_SIZE, [title, *names])
    pen.text((_EDGE, 6), title, fill=_INK, font=font)
    x = float(_EDGE)
    for name, text in zip(names, shown, strict=True):
        pen.text((x, 6 + _SIZE * 3 // 2), text, fill=colours[name], font=font)
        x += font.getlength(text) + 16
    for i, panel in enumerate(panels):
        _Axes(panel, i * (_LEFT + _WIDE + _EDGE) + _LEFT, top).paint(pen, font, colours)
    return sheet


class _Axes:
    """Where a panel's points lie on the sheet."""

    def __init__(self, panel: Panel, left: int, top: int) -> None:
        self.panel, self.left, self.top = panel, left, top
        points = [p for line in panel.lines for p in line.points] or [(1.0, 1.0)]
        self.x = _span([p[0] for p in points])
        self.y = _span([p[1] for p in points])

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log(y) - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * _WIDE, self.top + (1 - up) * _HIGH

    def paint(
        self, pen: ImageDraw.ImageDraw, font: Any, colours: dict[str, tuple[int, int, int]]
    ) -> None:
        """Draw the grid, the names and the curves.

        Args:
            pen: draws on the sheet.
            font: of all texts.
            colours: of the curves, by name.
        """
        low, high = self.top + _HIGH, self.left + _WIDE
        for value in _ticks(*self.x):
            x = self.at(value, math.exp(self.y[0]))[0]
            pen.line([(x, self.top), (x, low)], fill=_FAINT)
            pen.text((x - 12, low + 4), f"{value:g}", fill=_INK, font=font)
        for value in _ticks(*self.y):
            y = self.at(math.exp(self.x[0]), value)[1]
            pen.line([(self.left, y), (high, y)], fill=_FAINT)
            pen.text((self.left - 44, y - 7), f"{value:g}", fill=_INK, font=font)
        pen.rectangle([self.left, self.top, high, low], outline=_INK)
        pen.text((self.left + _WIDE // 2 - 20, low + 24), self.panel.x, fill=_INK, font=font)
        pen.text((self.left - 44, self.top - 18), self.panel.y, fill=_INK, font=font)
        for line in self.panel.lines:
            places = [self.at(*p) for p in sorted(line.points)]
            if line.joined:
                pen.line(places, fill=colours[line.name], width=2)
            for x, y in places:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[line.name])


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return logarithms of both ends, with some room."""
    low, high = math.log(min(values)), math.log(max(values))
    room = max(0.1, 0.06 * (high - low))
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 times powers of ten between two logarithms; tens alone where many fit."""
    first, last = math.floor(low / math.log(10)), math.ceil(high / math.log(10))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    values = [s * 10.0**e for e in range(first, last + 1) for s in steps]
    return [v for v in values if low <= math.log(v) <= high]
