"""Search by slopes: every picture tells something of every head.

Short pictures are drawn with a set of heads each, as large as the one that is sought, and
differentiated through all of their steps, denoiser, scheduler and autoencoder: one backward
gives the slope of the objective with respect to the strength u of every head, of those in the
set at their full strength and of the others beside them.

What switching a head on gains is the integral of its slope over u. Seen are its two ends, u = 1
inside of a set and u = 0 outside, and their mean is the trapezoidal rule; so harm that heads do
at full strength shows, as it does not in slopes at u = 0. Heads are not inside equally often,
so the slope is regressed on being inside and read off halfway.

A picture that is about to fall apart has slopes many times as steep as the others', and would
decide alone; so the rows of a turn are shortened to the median length, which is also their
unit: guidance by better sets flattens all slopes.

This is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .headset import Head, Round
from .rank import best, rounded, told
from .thompson import Belief, thompson

__all__ = ["Slopes", "gradient", "halfway", "screening", "shortened"]

Slopes = Callable[[Sequence[tuple[Head, ...]], Sequence[int]], Tensor]
"""`slopes(sets, pictures) -> [n, P]`: set i on picture i, see `Trials.slopes`."""

TURNS = 8
STRAIGHT = 3.0
"""Weight of the assumption that a slope is the same inside as outside: the ridge of the
regression, as heavy as 12 pictures with the head inside of half of them."""


def gradient(
    slopes: Slopes,
    pool: Sequence[Head],
    rounds: int,
    top_k: int,
    *,
    every: Sequence[Head],
    count: int,
    pictures: int,
) -> list[Round]:
    """Search by slopes; all heads are found together and told in rounds, the best first.

    Args:
        slopes: slopes of all heads of the model on top of sets.
        pool: the heads that may be chosen.
        rounds: R.
        top_k: k.
        every: the heads in the order of the slopes' columns.
        count: pictures to draw.
        pictures: different pictures.
    """
    keep = rounds * top_k
    scores = screening(slopes, pool, keep, every=every, count=count, pictures=pictures).scores
    return told(best(scores, keep), scores, rounds, top_k)


def screening(
    slopes: Slopes,
    pool: Sequence[Head],
    keep: int,
    *,
    every: Sequence[Head],
    count: int,
    pictures: int,
) -> Belief:
    """Return what slopes tell of the heads.

    Rows count in units of their turn's median length (see `shortened`). What comes of them is
    multiplied by the median length of all rows, so that it compares with gains in the score.

    Args:
        slopes: slopes of all heads of the model on top of sets.
        pool: the heads that may be chosen.
        keep: heads that are sought.
        every: the heads in the order of the slopes' columns.
        count: pictures to draw.
        pictures: different pictures.
    """
    columns = [every.index(head) for head in pool]
    lengths: list[Tensor] = []

    def look(sets: Sequence[tuple[Head, ...]], drawn: Sequence[int]) -> Tensor:
        rows = slopes(sets, drawn)[:, columns]
        lengths.append(rows.norm(dim=1))
        return shortened(rows)

    sizes = [len(pool)] * TURNS
    scores, spread = thompson(look, halfway, pool, keep, sizes, count, pictures)
    unit = rounded(float(torch.cat(lengths).median()))
    return Belief({head: rounded(unit * x) for head, x in scores.items()}, unit * spread)


def halfway(inside: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Return each head's slope halfway between outside and inside, and its standard error.

    Args:
        inside: [n, P], 1 where a head was in the set.
        slopes: [n, P].

    Returns:
        [P] float64, and the errors as a diagonal [P, P].
    """
    x = inside - 0.5
    middle, mean = x.mean(0), slopes.mean(0)
    x, y = x - middle, slopes - mean
    weight = x.square().sum(0) + STRAIGHT
    bend = (x * y).sum(0) / weight
    rest = (y - bend * x).square().mean(0)
    error = (rest * (1 / len(x) + middle.square() / weight)).sqrt()
    return mean - bend * middle, error.diag()


def shortened(slopes: Tensor) -> Tensor:
    """Return slopes [m, P] in units of the median row's length, none longer than that."""
    length = slopes.norm(dim=1, keepdim=True)
    unit = length.median().clamp(min=1e-30)
    return slopes / torch.maximum(length, unit)
