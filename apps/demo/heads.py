"""The head grid: layers downwards, heads to the right; a click chooses a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from attnctl.apps.lettering import lettering

__all__ = ["Grid", "toggled"]

Head = tuple[int, int]
_CELL, _FRAME, _MARGIN = 64, 5, 40
_STEP = _CELL + 3
_PAPER, _INK, _PLAIN, _CHOSEN = (255, 255, 255), (0, 0, 0), (215, 219, 226), (20, 120, 80)


@dataclass(frozen=True)
class Grid:
    """The heads of a model.

    Args:
        heads: (layer, head), in order.
        cells: a picture for each, or none at all.
    """

    heads: tuple[Head, ...]
    cells: tuple[Image.Image, ...] = ()

    @staticmethod
    def cell(image: Image.Image) -> Image.Image:
        """Return a picture as small as a cell."""
        side = _CELL - 2 * _FRAME
        return image.resize((side, side), Image.Resampling.LANCZOS)

    @property
    def layers(self) -> list[int]:
        """The layers that have heads."""
        return sorted({layer for layer, _ in self.heads})

    def picture(self, chosen: Sequence[Head] = ()) -> Image.Image:
        """Draw the grid; chosen heads are framed in green."""
        wide = 1 + max(head for _, head in self.heads)
        size = (_MARGIN + wide * _STEP, _MARGIN + len(self.layers) * _STEP)
        sheet = Image.new("RGB", size, _PAPER)
        pen = ImageDraw.Draw(sheet)
        font, _ = lettering(14, [])
        for head in range(wide):
            pen.text((_MARGIN + head * _STEP + 20, 14), f"H{head}", fill=_INK, font=font)
        for row, layer in enumerate(self.layers):
            pen.text((6, _MARGIN + row * _STEP + 22), f"L{layer}", fill=_INK, font=font)
        for i, place in enumerate(self.heads):
            x, y = self._corner(place)
            frame = _CHOSEN if place in chosen else _PLAIN
            sheet.paste(frame, (x, y, x + _CELL, y + _CELL))
            if self.cells:
                sheet.paste(self.cells[i], (x + _FRAME, y + _FRAME))
        return sheet

    def at(self, x: float, y: float) -> Head | None:
        """Return the head at a place of the picture, in pixels; None between the cells."""
        for head in self.heads:
            left, top = self._corner(head)
            if left <= x < left + _CELL and top <= y < top + _CELL:
                return head
        return None

    def _corner(self, head: Head) -> tuple[int, int]:
        return _MARGIN + head[1] * _STEP, _MARGIN + self.layers.index(head[0]) * _STEP


def toggled(chosen: Sequence[Head], head: Head | None) -> list[Head]:
    """Return the chosen heads with one more, or without it if it was among them."""
    return sorted({*chosen} ^ ({head} if head is not None else set()))
