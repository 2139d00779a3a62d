"""HeadHunter's greedy search.

    S = {};  R times:  score S + {h} for every head h left;  add the k best to S

Heads of a round are scored one at a time on top of S and the k winners are added together.

Reference:
    Ahn et al., "Where and How to Perturb", NeurIPS 2025 (arXiv 2506.10978), algorithm 1. Its
    code scores heads again that are in S already; here they are left out, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from .headset import Head, Round
from .rank import Evaluate, best, means

__all__ = ["greedy"]


def greedy(evaluate: Evaluate, pool: Sequence[Head], rounds: int, top_k: int) -> list[Round]:
    """Search by the paper's algorithm.

    Args:
        evaluate: scores candidates on all pictures at full length.
        pool: the heads, at least `rounds * top_k`.
        rounds: R.
        top_k: k.
    """
    found: list[Round] = []
    chosen: tuple[Head, ...] = ()
    for _ in range(rounds):
        left = [head for head in pool if head not in chosen]
        scores = means(left, evaluate([(*chosen, head) for head in left]))
        found.append(Round(best(scores, top_k), scores))
        chosen += found[-1].chosen
    return found
