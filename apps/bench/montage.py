"""Wins and losses as a picture: pairs of stock and controlled outputs, framed green or red."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from attnctl.apps.lettering import lettering, wrapped
from attnctl.assets.train.sheet import BAD, GOOD

from .compare import Pair
from .tasks import Shown, Task
from .trials import Outcome

__all__ = ["montage"]

MOST = 6
COLUMNS = 3
_SIDE, _FRAME, _GAP, _SIZE, _LINES = 128, 4, 16, 15, 2
_PAPER, _INK, _FAINT = (255, 255, 255), (0, 0, 0), (96, 96, 96)
_LINE = round(1.4 * _SIZE)


def montage(
    task: Task, arm: Outcome, stock: Outcome, pair: Pair, title: str, subtitle: str
) -> Image.Image:
    """Return a sheet of the first wins and the first losses, by case number.

    Args:
        task: the task.
        arm: the control's outcome.
        stock: stock's.
        pair: which cases are won and lost.
        title: first line.
        subtitle: second line, in grey.
    """
    alike = len(task.prompts) - len(pair.wins) - len(pair.losses)
    parts: list[_Text | _Row] = [
        _Text([title], _INK),
        _Text([subtitle, f"Left stock, right {pair.arm}. Alike: {alike}."], _FAINT),
    ]
    for name, cases in (("won", pair.wins), ("lost", pair.losses)):
        shown = cases[:MOST]
        of = f", the first {len(shown)}" if len(shown) < len(cases) else ""
        parts.append(_Text([f"{name}: {len(cases)}{of}"], _INK))
        for i in range(0, len(shown), COLUMNS):
            row = shown[i : i + COLUMNS]
            parts.append(_Row([_Cell(task, case, stock, arm, name == "won") for case in row]))
    return _stacked(parts)


class _Text:
    def __init__(self, lines: Sequence[str], ink: tuple[int, int, int]) -> None:
        self.font, texts = lettering(_SIZE, list(lines))
        self.lines = [line for text in texts for line in wrapped(text, self.font, _WIDE, _LINES)]
        self.ink = ink

    @property
    def height(self) -> int:
        return _LINE * len(self.lines)

    def paint(self, sheet: Image.Image, left: int, top: int) -> None:
        pen = ImageDraw.Draw(sheet)
        for i, line in enumerate(self.lines):
            pen.text((left, top + i * _LINE), line, fill=self.ink, font=self.font)


class _Cell:
    """One case: what it asks for over two framed outputs, their texts under them."""

    def __init__(self, task: Task, case: int, stock: Outcome, arm: Outcome, won: bool) -> None:
        self.shown = [task.show(case, o.outputs[case]) for o in (stock, arm)]
        self.colours = (BAD, GOOD) if won else (GOOD, BAD)
        self.font, (prompt, *texts) = lettering(
            _SIZE - 2, [task.prompts[case], *(s.text for s in self.shown)]
        )
        self.prompt = wrapped(prompt, self.font, _CELL, 3)
        self.texts = [wrapped(text, self.font, _SIDE, 4) for text in texts]
        self.sizes = [_fitted(shown) for shown in self.shown]

    @property
    def height(self) -> int:
        lines = len(self.prompt) + max(map(len, self.texts))
        return _LINE * lines + max(high for _, high in self.sizes) + 2 * _FRAME

    def paint(self, sheet: Image.Image, left: int, top: int) -> None:
        pen = ImageDraw.Draw(sheet)
        for i, line in enumerate(self.prompt):
            pen.text((left, top + i * _LINE), line, fill=_INK, font=self.font)
        top += _LINE * len(self.prompt)
        whole = zip(self.shown, self.sizes, self.colours, self.texts, strict=True)
        for i, (shown, size, colour, lines) in enumerate(whole):
            x = left + i * (_SIDE + 2 * _FRAME)
            framed = (x, top, x + size[0] + 2 * _FRAME - 1, top + size[1] + 2 * _FRAME - 1)
            pen.rectangle(framed, fill=colour)
            small = shown.image.convert("RGB").resize(size, Image.Resampling.NEAREST)
            sheet.paste(small, (x + _FRAME, top + _FRAME))
            for j, line in enumerate(lines):
                y = framed[3] + 1 + j * _LINE
                pen.text((x, y), line, fill=colour, font=self.font)


class _Row:
    def __init__(self, cells: Sequence[_Cell]) -> None:
        self.cells = cells

    @property
    def height(self) -> int:
        return max(cell.height for cell in self.cells)

    def paint(self, sheet: Image.Image, left: int, top: int) -> None:
        for i, cell in enumerate(self.cells):
            cell.paint(sheet, left + i * (_CELL + _GAP), top)


_CELL = 2 * (_SIDE + 2 * _FRAME)
_WIDE = COLUMNS * (_CELL + _GAP) - _GAP


def _fitted(shown: Shown) -> tuple[int, int]:
    """Return the size at which an output is shown: as wide as the cell allows."""
    factor = _SIDE / shown.image.width
    return _SIDE, max(1, round(shown.image.height * factor))


def _stacked(parts: Sequence[_Text | _Row]) -> Image.Image:
    height = sum(part.height + _GAP for part in parts) + _GAP
    sheet = Image.new("RGB", (_WIDE + 2 * _GAP, height), _PAPER)
    top = _GAP
    for part in parts:
        part.paint(sheet, _GAP, top)
        top += part.height + _GAP
    return sheet
