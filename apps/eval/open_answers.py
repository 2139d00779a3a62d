"""What is told of every open answer beside its score: length, repetition, an end of its own.

CHAIR falls when text degenerates, so none of its figures may stand without these.
"""

from __future__ import annotations

from collections.abc import Sequence

from .estimate import Figure, ratio
from .items import Answer

__all__ = ["FIGURES", "open_counts"]

FIGURES = (
    Figure("words", "words", lambda s: ratio(s["words"], s["captions"]), "", 1),
    Figure("distinct1", "distinct-1", lambda s: ratio(s["distinct1"], s["captions"])),
    Figure("distinct2", "distinct-2", lambda s: ratio(s["distinct2"], s["captions"])),
    Figure("ended", "ended by itself", lambda s: ratio(s["ended"], s["ended n"])),
)


def open_counts(answer: Answer) -> dict[str, float]:
    """Return the counts of one answer."""
    words = answer.text.lower().split()
    return {
        "captions": 1,
        "words": len(words),
        "distinct1": distinct(words, 1),
        "distinct2": distinct(words, 2),
        "ended": answer.ended is True,
        "ended n": answer.ended is not None,
    }


def distinct(words: Sequence[str], n: int) -> float:
    """Return the share of different n-grams among those of one answer; 0 if it has none."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
