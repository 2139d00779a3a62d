"""Film strips: clips as rows of frames over time, with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from attnctl.assets.train.sheet import BAD, GAP, GOOD, picture

CELL, LINE = 96, 16


def strips(
    clips: Tensor, captions: Sequence[str], good: Sequence[bool], path: Path, every: int = 2
) -> None:
    """Save clips as rows of frames, captions green where judged right and red where not.

    Args:
        clips: ``[N, F, 3, H, W]`` RGB in 0 to 1.
        captions: N captions.
        good: N verdicts.
        path: the PNG to write.
        every: show each ``every``-th frame.
    """
    shown = clips[:, ::every]
    width = GAP + shown.shape[1] * (CELL + GAP // 2)
    height = GAP + len(shown) * (LINE + CELL + GAP)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, (clip, words, fine) in enumerate(zip(shown, captions, good, strict=True)):
        y = GAP + i * (LINE + CELL + GAP)
        pen.text((GAP, y), words, fill=GOOD if fine else BAD)
        for j, frame in enumerate(clip):
            cell = picture(frame).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (GAP + j * (CELL + GAP // 2), y + LINE))
    sheet.save(path, optimize=True)
