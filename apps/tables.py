"""Plain text tables and paragraphs that fit the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

__all__ = ["breakable", "paragraph", "shortened", "table", "terminal_width"]

_WORD = 5


def terminal_width() -> int:
    """Columns of the terminal, 80 if unknown."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def shortened(name: str, width: int) -> str:
    """Return a dotted name in at most `width` letters; "~" stands for what is left out.

    Long words go first, so that the numbers, which tell sites apart, stay.
    """
    parts = name.split(".")
    while len(name) > width and max(map(len, parts)) > _WORD:
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[longest] = parts[longest][: _WORD - 1] + "~"
        name = ".".join(parts)
    if len(name) <= width:
        return name
    left = (width - 1) // 2
    return f"{name[:left]}~{name[len(name) - (width - 1 - left) :]}"


def paragraph(text: str, width: int, first: str = "", rest: str | None = None) -> str:
    """Return a text wrapped to a width.

    Args:
        text: the text.
        width: letters per line.
        first: put before the first line.
        rest: put before the others; None for blanks as wide as `first`.
    """
    return textwrap.fill(
        breakable(text, width // 2),
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first) if rest is None else rest,
        break_on_hyphens=False,
    )


def breakable(text: str, longest: int) -> str:
    """Put blanks after the commas of words that are longer than `longest`."""
    words = (w if len(w) <= longest else w.replace(",", ", ").strip() for w in text.split(" "))
    return " ".join(words)


def table(
    heads: Sequence[str], rows: Sequence[Sequence[object]], width: int | None, right: str = ""
) -> str:
    """Return rows in columns.

    Args:
        heads: the column heads; the last column gets the room that is left.
        rows: the cells.
        width: letters per line; None to let the last column be as long as it is.
        right: for each column "r" to align right, anything else for left.
    """
    cells = [[str(c) for c in row] for row in (heads, *rows)]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        wide[-1] = max(8, min(wide[-1], width - sum(wide[:-1]) - 2 * (len(wide) - 1)))
    sides = right.ljust(len(wide))
    lines = []
    for row in cells:
        parts = [
            cell.rjust(w) if side == "r" else shortened(cell, w).ljust(w)
            for cell, w, side in zip(row, wide, sides, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
