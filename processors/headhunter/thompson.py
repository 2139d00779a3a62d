"""Turns of drawing head sets, looking at them, and drawing nearer to the best.

What a head is worth depends on the heads beside it, so the sets must come near the one that is
sought. The first turn draws random sets of its size; from then on each picture draws a value of
every head, from what is known of it so far and how surely, and takes the best: heads that are
surely good are always in, those on the brink half of the time. This is Thompson sampling.

Reference:
    Thompson, "On the Likelihood that One Unknown Probability Exceeds Another in View of the
    Evidence of Two Samples", Biometrika 25, 1933.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .headset import Head
from .rank import best, rounded

__all__ = ["Belief", "Believe", "Look", "in_turn", "random_sets", "thompson"]

Look = Callable[[Sequence[tuple[Head, ...]], Sequence[int]], Tensor]
"""`look(sets, pictures) -> [m, ...]`: what is seen of set i on picture i."""

Believe = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`believe(inside, seen) -> mean [P], spread [P, P]`: a draw is `mean + spread @ z`, z normal.

`inside` [n, P] float64 is 1 where a head was in a set, `seen` [n, ...] what was seen of it.
"""


class Belief(NamedTuple):
    """What is known of the heads."""

    scores: dict[Head, float]
    """By head, in the order of the pool."""
    spread: Tensor
    """[P, P] float64, a root of their covariance."""


def thompson(
    look: Look,
    believe: Believe,
    pool: Sequence[Head],
    keep: int,
    sizes: Sequence[int],
    count: int,
    pictures: int,
    known: Belief | None = None,
) -> Belief:
    """Return what is known of the heads after all turns.

    Args:
        look: what is seen of sets.
        believe: what that tells of the heads.
        pool: the heads that may be chosen.
        keep: heads that are sought.
        sizes: for each turn, how many of the heads that look best take part.
        count: pictures to draw, at least one; every turn has an equal share.
        pictures: different pictures.
        known: what is known before; None for nothing, then the first sets are random.
    """
    source = random.Random(0)
    # a set leaves out at least as many as it holds
    size = min(keep, max(1, len(pool) // 2))
    order = in_turn(pictures, count, source)
    cuts = [count * t // len(sizes) for t in range(len(sizes) + 1)]
    inside = torch.empty(0, len(pool), dtype=torch.float64)
    seen: list[Tensor] = []
    nothing = torch.zeros(len(pool), len(pool), dtype=torch.float64)
    scores, spread = known or Belief(dict.fromkeys(pool, 0.0), nothing)
    for heads, start, stop in zip(sizes, cuts[:-1], cuts[1:], strict=True):
        if start == stop:
            continue
        if seen or known:
            left = best(scores, max(heads, size))
            sets = [_drawn(scores, spread, left, size, source) for _ in range(start, stop)]
        else:
            sets = random_sets(pool, size, stop - start, source)
        seen.append(look(sets, order[start:stop]))
        rows = [[float(head in heads) for head in pool] for heads in sets]
        inside = torch.cat([inside, torch.tensor(rows, dtype=torch.float64)])
        mean, spread = believe(inside, torch.cat(seen))
        scores = dict(zip(pool, map(rounded, mean.tolist()), strict=True))
    return Belief(scores, spread)


def _drawn(
    scores: dict[Head, float],
    spread: Tensor,
    left: Sequence[Head],
    size: int,
    source: random.Random,
) -> tuple[Head, ...]:
    """Return the best of the heads that are left, by one draw of all values."""
    normal = torch.tensor([source.gauss(0, 1) for _ in scores], dtype=torch.float64)
    shift = dict(zip(scores, (spread @ normal).tolist(), strict=True))
    return tuple(sorted(best({head: rounded(scores[head] + shift[head]) for head in left}, size)))


def random_sets(
    pool: Sequence[Head], size: int, count: int, source: random.Random
) -> list[tuple[Head, ...]]:
    """Return random sets in which every head is about equally often."""
    found: list[tuple[Head, ...]] = []
    waiting: list[Head] = []
    while len(found) < count:
        if len(waiting) < size:
            fresh = [head for head in pool if head not in waiting]
            source.shuffle(fresh)
            waiting += fresh
        found.append(tuple(sorted(waiting[:size])))
        waiting = waiting[size:]
    return found


def in_turn(pictures: int, count: int, source: random.Random) -> list[int]:
    """Return picture numbers, every one about equally often."""
    order: list[int] = []
    while len(order) < count:
        fresh = list(range(pictures))
        source.shuffle(fresh)
        order += fresh
    return order[:count]
