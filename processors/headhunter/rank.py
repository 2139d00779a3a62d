"""What the strategies share: ranking heads, and the numbers a strategy reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .headset import Head, Round

__all__ = ["Evaluate", "Report", "best", "rounded"]

Evaluate = Callable[..., Tensor]
"""`evaluate(candidates, pictures=None, steps=None) -> scores [C, m]`, see `Trials.score`."""

Report = Callable[[Round], None]
"""Called after every round."""

DIGITS = 6


def rounded(value: float) -> float:
    """Return a score with `DIGITS` significant digits.

    Pictures drawn in batches of another size differ in the last bits; ties must not depend on
    them.
    """
    return float(f"{value:.{DIGITS - 1}e}")


def best(scores: Mapping[Head, float], k: int) -> tuple[Head, ...]:
    """Return the k heads with the highest scores, ties by (layer, head)."""
    return tuple(sorted(scores, key=lambda head: (-scores[head], head))[:k])


def means(heads: Sequence[Head], scores: Tensor) -> dict[Head, float]:
    """Return the mean score by head, from scores [C, m] of one candidate per head."""
    return {h: rounded(float(row.mean())) for h, row in zip(heads, scores, strict=True)}
