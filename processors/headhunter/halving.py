"""Search by scores of sets, every turn among fewer heads.

A picture with one perturbed head says something of that head alone, and little of what it does
beside others. So each picture is drawn with a set of heads as large as the one that is sought,
and a regression of the scores on who was in the set gives each head's part. All pictures so far
take part in every regression; what it leaves open is what the next sets are drawn by.

Scores are compared with the same picture without guidance. Outliers are pulled in: a picture
that falls apart says that something is wrong, but not how wrong to how many digits.

Where the objective has gradients, a screening by slopes comes first (see gradient.py): a backward
tells of all heads at once what takes scores of many sets. Scores then verify: they are drawn where
the slopes leave it open, and correct them by as much as the slopes' own errors allow.

This is ours, not the paper's. Halving follows Jamieson and Talwalkar, "Non-stochastic Best Arm
Identification and Hyperparameter Optimization", 2016 (arXiv 1502.07943), algorithm 1, in more
and smaller steps; sets in place of single arms are group testing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .headset import Head, Round
from .rank import best, told
from .thompson import Belief, Believe, thompson

__all__ = ["brief", "corrected", "effects", "halving", "turns"]

EvaluateEach = Callable[[Sequence[tuple[Head, ...]], Sequence[int], int], Tensor]
"""`evaluate(sets, pictures, steps) -> [n]`: set i on picture i, see `Trials.each`."""

FEWEST_STEPS = 6
TURNS = 6
CLIP = 2.5
"""Scores further from their turn's median than this many spreads (1.48 MAD) are pulled in."""
RIDGES = tuple(10.0 ** (e / 2) for e in range(-4, 9))


def brief(steps: int) -> int:
    """Return the steps of a picture: a third of the full ones, but not fewer than six."""
    return min(steps, max(FEWEST_STEPS, steps // 3))


def turns(heads: int, keep: int) -> list[int]:
    """Return how many heads take part in each turn, each time the same part of those before.

    Args:
        heads: heads in the first turn.
        keep: heads that would be left after the last one.
    """
    return [math.ceil(heads * (keep / heads) ** (t / TURNS)) for t in range(TURNS)]


def halving(
    evaluate: EvaluateEach,
    pool: Sequence[Head],
    rounds: int,
    top_k: int,
    *,
    count: int,
    pictures: int,
    steps: int,
    screened: Belief | None = None,
) -> list[Round]:
    """Search by turns; all heads are found together and told in rounds, the best first.

    Args:
        evaluate: scores sets on a picture each.
        pool: the heads.
        rounds: R.
        top_k: k.
        count: pictures to draw with sets, beside one without for each different picture.
        pictures: different pictures.
        steps: of each.
        screened: what slopes have told of the heads, as gains; None for scores alone.
    """
    base = evaluate([()] * pictures, range(pictures), steps)

    def look(sets: Sequence[tuple[Head, ...]], drawn: Sequence[int]) -> Tensor:
        return _clipped(evaluate(sets, drawn, steps) - base[list(drawn)])

    keep = rounds * top_k
    sizes = turns(len(pool), keep)
    believe = effects if screened is None else corrected(screened)
    scores = thompson(look, believe, pool, keep, sizes, count, pictures, screened).scores
    return told(best(scores, keep), scores, rounds, top_k)


def effects(inside: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Return each head's part in the gain by ridge regression, and how unsure it is.

    The ridge is the one of `RIDGES` with the smallest leave-one-out error.

    Args:
        inside: [n, P], 1 where a head was in the set.
        gains: [n].

    Returns:
        [P] float64, 0 for heads that were in no set or in all; and a root [P, P] of the
        covariance, that of the ridge as a prior.
    """
    x, y = inside - inside.mean(0), gains - gains.mean()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    along = u.T @ y

    def error(ridge: float) -> float:
        kept = s**2 / (s**2 + ridge)
        own = ((u * kept) * u).sum(1)
        return float((((y - u @ (kept * along)) / (1 - own.clamp(max=0.999))) ** 2).mean())

    ridge = min(RIDGES, key=error)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    factor = torch.linalg.cholesky(x.T @ x + ridge * eye)
    root = torch.linalg.solve_triangular(factor.T, eye, upper=True)
    return vt.T @ (s / (s**2 + ridge) * along), math.sqrt(error(ridge)) * root


def corrected(screened: Belief) -> Believe:
    """Return how scores correct slopes: Bayesian regression with the slopes as the prior."""
    mean = torch.tensor(list(screened.scores.values()), dtype=torch.float64)
    eye = torch.eye(len(mean), dtype=torch.float64)

    def believe(inside: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        x, y = inside - inside.mean(0), gains - gains.mean()
        rest = y - x @ mean
        # of what the slopes leave open: that of the scores and of the slopes themselves
        noise = rest.square().mean().clamp(min=1e-30)
        # heads = mean + spread @ z, and z is standard normal before the scores are seen
        seen = x @ screened.spread
        factor = torch.linalg.cholesky(eye + seen.T @ seen / noise)
        root = screened.spread @ torch.linalg.solve_triangular(factor.T, eye, upper=True)
        return mean + root @ (root.T @ (x.T @ rest)) / noise, root

    return believe


def _clipped(gains: Tensor) -> Tensor:
    middle = gains.median()
    spread = 1.4826 * (gains - middle).abs().median()
    if spread == 0:
        return gains
    return gains.clamp(float(middle - CLIP * spread), float(middle + CLIP * spread))
