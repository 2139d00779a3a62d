"""Contact sheets: all results small, with what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..lettering import lettering, wrapped
from ..pictures import INK, PAPER
from ..videos import read_frames
from .plan import Planned

__all__ = ["contact_sheets"]

_ACROSS, _DOWN = 6, 6
_SIDE, _LINE, _GAP = 192, 15, 12
_CELL = (_SIDE + _GAP, _SIDE + 3 * _LINE + _GAP)


def contact_sheets(folder: Path, plan: Sequence[Planned]) -> Iterator[Image.Image]:
    """Yield sheets of at most 36 results each; of videos the middle frame.

    Args:
        folder: where the results lie.
        plan: the results, in order.
    """
    per_sheet = _ACROSS * _DOWN
    for start in range(0, len(plan), per_sheet):
        yield _sheet(folder, plan[start : start + per_sheet])


def _sheet(folder: Path, plan: Sequence[Planned]) -> Image.Image:
    texts = [_caption(one) for one in plan]
    font, texts = lettering(_LINE - 3, texts)
    down = -(-len(plan) // _ACROSS)
    size = (_ACROSS * _CELL[0] + _GAP, down * _CELL[1] + _GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (one, text) in enumerate(zip(plan, texts, strict=True)):
        left, top = _GAP + i % _ACROSS * _CELL[0], _GAP + i // _ACROSS * _CELL[1]
        small = _thumbnail(folder / one.file)
        sheet.paste(small, (left + (_SIDE - small.width) // 2, top + _SIDE - small.height))
        for j, line in enumerate(wrapped(text, font, _SIDE, 3)):
            pen.text((left, top + _SIDE + j * _LINE), line, fill=INK, font=font)
    return sheet


def _caption(one: Planned) -> str:
    controls = " + ".join(map(str, one.chosen))
    parts = [f"seed {one.item.settings.seed}", controls, one.item.prompt[:200]]
    return ", ".join(part for part in parts if part)


def _thumbnail(path: Path) -> Image.Image:
    if path.suffix == ".mp4":
        frames = read_frames(path)
        image = Image.fromarray(frames[len(frames) // 2])
    else:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return image.resize(size, smooth)
