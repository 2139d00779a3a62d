"""Successive halving by random sets: every picture tells something of many heads.

A picture with one perturbed head says something of that head alone, and little of what it does
beside others. So each picture is drawn with a random set of heads as large as the one that is
sought; a regression of the scores on who was in the set gives each head's part; the worse half
of the heads is dropped, and the next pictures draw their sets from the rest. All pictures so
far take part in every regression.

Scores are compared with the same picture without guidance. Outliers are pulled in: a picture
that falls apart says that something is wrong, but not how wrong to how many digits.

This is ours, not the paper's. Halving follows Jamieson and Talwalkar, "Non-stochastic Best Arm
Identification and Hyperparameter Optimization", 2016 (arXiv 1502.07943), algorithm 1; sets in
place of single arms are group testing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .headset import Head, Round
from .rank import Report, best, rounded, told

__all__ = ["Stage", "effects", "halving", "in_turn", "random_sets", "short", "stages"]

EvaluateEach = Callable[[Sequence[tuple[Head, ...]], Sequence[int], int], Tensor]
"""`evaluate(sets, pictures, steps) -> [n]`: set i on picture i, see `Trials.each`."""

FEWEST_STEPS = 6
CLIP = 2.5
"""Scores further from their stage's median than this many spreads (1.48 MAD) are pulled in."""
RIDGES = tuple(10.0 ** (e / 2) for e in range(-4, 9))


@dataclass(frozen=True)
class Stage:
    """One stage: how many heads enter, how many are in each set, how many pictures are drawn."""

    heads: int
    size: int
    pictures: int


def short(steps: int) -> int:
    """Return the steps of a picture: half of the full ones, but not fewer than six."""
    return min(steps, max(FEWEST_STEPS, steps // 2))


def stages(heads: int, keep: int, pictures: int) -> list[Stage]:
    """Return stages that halve the heads down to those that are kept.

    Args:
        heads: heads at the start.
        keep: heads wanted at the end.
        pictures: pictures to draw; every stage gets an equal share, and at least one.
    """
    sizes = [heads]
    while (after := max(keep, -(-sizes[-1] // 2))) > keep:
        sizes.append(after)
    share = max(1, pictures // len(sizes))
    return [Stage(n, min(keep, max(1, n // 2)), share) for n in sizes]


def halving(
    evaluate: EvaluateEach,
    pool: Sequence[Head],
    rounds: int,
    top_k: int,
    report: Report,
    *,
    plan: Sequence[Stage],
    pictures: int,
    steps: int,
) -> list[Round]:
    """Search by stages; all heads are found together and told in rounds, the best first.

    Args:
        evaluate: scores sets on a picture each.
        pool: the heads.
        rounds: R.
        top_k: k.
        report: called for every round.
        plan: the stages.
        pictures: different pictures.
        steps: of each.
    """
    source = random.Random(0)
    base = evaluate([()] * pictures, range(pictures), steps)
    place = {head: i for i, head in enumerate(pool)}
    left, gains, members = list(pool), [], []
    part = torch.zeros(len(pool), dtype=torch.float64)
    for stage, after in zip(plan, [*plan[1:], None], strict=True):
        sets = random_sets(left, stage.size, stage.pictures, source)
        drawn = in_turn(pictures, stage.pictures, source)
        gains.append(_clipped(evaluate(sets, drawn, steps) - base[drawn]))
        inside = torch.zeros(len(sets), len(pool), dtype=torch.float64)
        for row, heads in zip(inside, sets, strict=True):
            row[[place[head] for head in heads]] = 1
        members.append(inside)
        part = effects(members, gains)
        found = {head: rounded(float(part[place[head]])) for head in left}
        left = sorted(best(found, rounds * top_k if after is None else after.heads))
    scores = {head: rounded(float(x)) for head, x in zip(pool, part, strict=True)}
    order = best({head: scores[head] for head in left}, rounds * top_k)
    return told(order, scores, rounds, top_k, report)


def effects(members: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
    """Return each head's part in the gain, by ridge regression.

    Every stage has a mean of its own, since its sets come from other heads. The ridge is the
    one of `RIDGES` with the smallest leave-one-out error.

    Args:
        members: for each stage [n, P], 1 where a head was in the set.
        gains: for each stage [n].

    Returns:
        [P] float64; 0 for heads that were in no set, or in all.
    """
    x = torch.cat([m - m.mean(0) for m in members])
    y = torch.cat([g - g.mean() for g in gains])
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    along = u.T @ y

    def error(ridge: float) -> float:
        kept = s**2 / (s**2 + ridge)
        own = ((u * kept) * u).sum(1)
        return float((((y - u @ (kept * along)) / (1 - own.clamp(max=0.999))) ** 2).mean())

    ridge = min(RIDGES, key=error)
    return vt.T @ (s / (s**2 + ridge) * along)


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


def _clipped(gains: Tensor) -> Tensor:
    middle = gains.median()
    spread = 1.4826 * (gains - middle).abs().median()
    if spread == 0:
        return gains
    return gains.clamp(float(middle - CLIP * spread), float(middle + CLIP * spread))
