"""Texts on pictures: a font that has the letters, and lines that fit."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Sequence
from typing import Any

from PIL import ImageFont

__all__ = ["lettering", "wrapped"]

_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf")


def lettering(size: int, texts: Sequence[str]) -> tuple[Any, list[str]]:
    """Return a font, and the texts in letters that it has.

    The built-in font has ASCII only; for more, a font of the system is used if there is one,
    else accents are dropped and other letters become "?".
    """
    with contextlib.suppress(ImportError):  # Pillow built without FreeType: one small size only
        for name in () if all(map(str.isascii, texts)) else _SYSTEM_FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size), list(texts)
        return ImageFont.load_default(size), list(map(_ascii, texts))
    return ImageFont.load_default(), list(map(_ascii, texts))


def _ascii(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    return plain.encode("ascii", "replace").decode()


def wrapped(text: str, font: Any, width: int, most: int) -> list[str]:
    """Break a text into lines that fit; what is too much ends in dots."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines += _pieces(word, font, width)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "..."]


def _pieces(word: str, font: Any, width: int) -> list[str]:
    """Cut a word that is wider than a line."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
