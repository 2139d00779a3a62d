"""Successive halving by slopes at random sets: every picture tells something of every head.

The stages are those of `halving`: pictures are short, each is drawn with a random set of heads
as large as the one that is sought, and the worse half of the heads drops out. Here each picture
is differentiated through all of its steps, denoiser, scheduler and autoencoder, and one backward
gives the slope of the objective with respect to the strength u of every head: of those in the
set at their full strength, of the others beside them. So harm that heads do at full strength
shows, as it does not in slopes at u = 0.

A picture that is about to fall apart has slopes many times as steep as the others', and would
decide alone; so the rows of a stage are shortened to the median length, which is also their
unit: guidance by better sets flattens all slopes.

This is ours, not the paper's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .halving import FEWEST_STEPS, Stage, in_turn, random_sets
from .headset import Head, Round
from .rank import Report, best, rounded, told

__all__ = ["Slopes", "brief", "gradient", "shortened"]

Slopes = Callable[[Sequence[tuple[Head, ...]], Sequence[int]], Tensor]
"""`slopes(sets, pictures) -> [n, P]`: set i on picture i, see `Trials.slopes`."""


def brief(steps: int) -> int:
    """Return the steps of a picture: a third of the full ones, but not fewer than six."""
    return min(steps, max(FEWEST_STEPS, steps // 3))


def gradient(
    slopes: Slopes,
    pool: Sequence[Head],
    rounds: int,
    top_k: int,
    report: Report,
    *,
    every: Sequence[Head],
    plan: Sequence[Stage],
    pictures: int,
) -> list[Round]:
    """Search by slopes; all heads are found together and told in rounds, the best first.

    Args:
        slopes: slopes of all heads of the model on top of sets.
        pool: the heads that may be chosen.
        rounds: R.
        top_k: k.
        report: called for every round.
        every: the heads in the order of the slopes' columns.
        plan: the stages.
        pictures: different pictures.
    """
    source = random.Random(0)
    columns = [every.index(head) for head in pool]
    left, seen, scores = list(pool), [], dict.fromkeys(pool, 0.0)
    for stage, after in zip(plan, [*plan[1:], None], strict=True):
        sets = random_sets(left, stage.size, stage.pictures, source)
        drawn = in_turn(pictures, stage.pictures, source)
        seen.append(shortened(slopes(sets, drawn)[:, columns]))
        scores = dict(zip(pool, map(rounded, torch.cat(seen).mean(0).tolist()), strict=True))
        found = {head: scores[head] for head in left}
        left = sorted(best(found, rounds * top_k if after is None else after.heads))
    order = best({head: scores[head] for head in left}, rounds * top_k)
    return told(order, scores, rounds, top_k, report)


def shortened(slopes: Tensor) -> Tensor:
    """Return slopes [m, P] in units of the median row's length, none longer than that."""
    length = slopes.norm(dim=1, keepdim=True)
    unit = length.median().clamp(min=1e-30)
    return slopes / torch.maximum(length, unit)
