"""What the strategies share: ranking heads, and telling those found together as rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .headset import Head, Round

__all__ = ["Evaluate", "best", "means", "rounded", "told"]

Evaluate = Callable[..., Tensor]
"""`evaluate(candidates, pictures=None, steps=None) -> scores [C, m]`, see `Trials.score`."""

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


def told(
    order: Sequence[Head], scores: Mapping[Head, float], rounds: int, top_k: int
) -> list[Round]:
    """Return heads that were found together as rounds, the best first.

    Args:
        order: the heads, best first, at least `rounds * top_k`.
        scores: of all heads; a round keeps those of the heads that were left.
        rounds: R.
        top_k: k.
    """
    found: list[Round] = []
    for r in range(rounds):
        before = set(order[: r * top_k])
        left = {head: score for head, score in scores.items() if head not in before}
        found.append(Round(tuple(order[r * top_k : (r + 1) * top_k]), left))
    return found
