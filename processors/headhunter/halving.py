"""Successive halving: many heads cheaply first, few heads properly last.

Each round's heads go through rungs. A rung draws a few pictures of a few steps for every head
that is left and keeps the better part; later rungs draw more and longer pictures. Scores are
compared on the same pictures, so that what the pictures share drops out.

Reference:
    Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
    Optimization", 2016 (arXiv 1502.07943), algorithm 1, with steps as second resource.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .headset import Head, Round
from .rank import Evaluate, Report, best, means

__all__ = ["Rung", "halving", "ladder"]

KEEP = 3
FEWEST_STEPS = 6


@dataclass(frozen=True)
class Rung:
    """One rung: how many heads enter, how many pictures of how many steps each gets."""

    heads: int
    pictures: int
    steps: int

    @property
    def cost(self) -> int:
        """Picture-steps."""
        return self.heads * self.pictures * self.steps


def ladder(heads: int, keep: int, pictures: int, steps: int, budget: int) -> list[Rung]:
    """Return rungs that cost at most `budget` picture-steps together, if that is possible.

    Args:
        heads: heads at the start.
        keep: heads wanted at the end.
        pictures: pictures of the full evaluation.
        steps: steps of the full evaluation.
        budget: picture-steps to spend; every rung gets an equal share, and at least one
            picture of `FEWEST_STEPS` steps per head.
    """
    sizes = [heads]
    while sizes[-1] > KEEP * keep:
        sizes.append(max(KEEP * keep, math.ceil(sizes[-1] / KEEP)))
    share = budget / len(sizes)
    rungs = []
    for size in sizes:
        each = share / size
        length = min(steps, max(FEWEST_STEPS, min(round(math.sqrt(each * steps / 4)), steps)))
        rungs.append(Rung(size, min(pictures, max(1, int(each / length))), length))
    return rungs


def halving(
    evaluate: Evaluate,
    pool: Sequence[Head],
    rounds: int,
    top_k: int,
    report: Report,
    *,
    pictures: int,
    steps: int,
    budget: int,
) -> list[Round]:
    """Search by rungs.

    Args:
        evaluate: scores candidates.
        pool: the heads.
        rounds: R.
        top_k: k.
        report: called after every round.
        pictures: pictures of a full evaluation.
        steps: steps of a full picture.
        budget: picture-steps to spend on each round.
    """
    found: list[Round] = []
    chosen: tuple[Head, ...] = ()
    for _ in range(rounds):
        left = [head for head in pool if head not in chosen]
        scores: dict[Head, float] = {}
        rungs = ladder(len(left), top_k, pictures, steps, budget)
        at = 0
        for rung, after in zip(rungs, [*rungs[1:], None], strict=True):
            # fresh pictures on every rung, as long as there are any
            drawn = [(at + i) % pictures for i in range(rung.pictures)]
            at += rung.pictures
            candidates = [(*chosen, head) for head in left]
            scores = means(left, evaluate(candidates, drawn, rung.steps))
            left = sorted(best(scores, top_k if after is None else after.heads))
        found.append(Round(best(scores, top_k), scores))
        chosen += found[-1].chosen
        report(found[-1])
    return found
