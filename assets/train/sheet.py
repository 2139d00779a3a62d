"""Contact sheets: pictures in rows and columns with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

CELL, TEXT, GAP = 160, 40, 8
GOOD, BAD = (0, 110, 60), (180, 40, 20)


def contact_sheet(
    images: Tensor,
    captions: Sequence[str],
    good: Sequence[bool],
    path: Path,
    columns: int = 6,
    text: int = TEXT,
) -> None:
    """Save pictures with their captions, written green where judged exact and red where not.

    Args:
        images: ``[N, 3, H, W]`` RGB in 0 to 1.
        captions: N captions.
        good: N verdicts.
        path: the PNG to write.
        columns: pictures per row.
        text: height of the captions in pixels.
    """
    rows = -(-len(images) // columns)
    size = (GAP + columns * (CELL + GAP), GAP + rows * (CELL + text + GAP))
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, (image, words, fine) in enumerate(zip(images, captions, good, strict=True)):
        x = GAP + i % columns * (CELL + GAP)
        y = GAP + i // columns * (CELL + text + GAP)
        sheet.paste(picture(image).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        pen.multiline_text((x, y + CELL + 2), wrapped(words), fill=GOOD if fine else BAD)
    sheet.save(path, optimize=True)


def picture(image: Tensor) -> Image.Image:
    """``[3, H, W]`` RGB in 0 to 1 as a PIL picture."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def wrapped(words: str, width: int = 26) -> str:
    """Caption broken into lines of at most ``width`` letters."""
    lines = [""]
    for word in words.split():
        fits = len(lines[-1]) + len(word) < width
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if fits else [lines[-1], word]
    return "\n".join(lines)
