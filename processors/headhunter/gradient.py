"""All heads ranked by a few backward passes, the sets this suggests compared by pictures.

The output of a perturbed head is linear in u, so the slope of the objective with respect to
every head's u comes from one backward of the guided one-step prediction (see `forecast`). What
such a prediction shows depends on the step: colours and layout early, shapes late. So slopes
are taken in several windows of the run; the k steepest heads of each window, and of all
together, make sets; the sets are compared by real pictures. A set of heads moves the objective
far more than a single head does, so few pictures tell sets apart where they would not tell
heads apart.

This is ours, not the paper's: it stands for its search at a fraction of the cost. Slopes hold
for small u and scale; where heads do harm at full strength, slopes do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .headset import Head, Round
from .rank import Evaluate, Report, best, rounded

__all__ = ["Slopes", "gradient"]

Slopes = Callable[[tuple[Head, ...]], Tensor]
"""`slopes(heads) -> [W, P]`: mean slope of each head in each window."""


def gradient(
    evaluate: Evaluate,
    slopes: Slopes,
    pool: Sequence[Head],
    rounds: int,
    top_k: int,
    report: Report,
    *,
    every: Sequence[Head],
    pictures: Callable[[int], int],
) -> list[Round]:
    """Search by slopes.

    Args:
        evaluate: scores head sets by real pictures.
        slopes: slopes of all heads of the model on top of a head set.
        pool: the heads that may be chosen.
        rounds: R.
        top_k: k.
        report: called after every round.
        every: the heads in the order of the slopes' columns.
        pictures: how many each compared set gets in round r; 0 trusts all windows together.
    """
    found: list[Round] = []
    chosen: tuple[Head, ...] = ()
    for r in range(rounds):
        left = [i for i, head in enumerate(every) if head in pool and head not in chosen]
        rankings = _rankings([every[i] for i in left], slopes(chosen)[:, left])
        scores = _winner(evaluate, chosen, rankings, top_k, pictures(r))
        found.append(Round(best(scores, top_k), scores))
        chosen += found[-1].chosen
        report(found[-1])
    return found


def _rankings(heads: Sequence[Head], slopes: Tensor) -> list[dict[Head, float]]:
    """Return one ranking for all windows together, then one for each.

    Windows are brought to one size first: late slopes are smaller, and tell no less.
    """
    scaled = slopes / slopes.abs().mean(1, keepdim=True).clamp(min=1e-30)
    rows = torch.cat([scaled.mean(0, keepdim=True), scaled]) if len(scaled) > 1 else scaled
    named = (zip(heads, row.tolist(), strict=True) for row in rows)
    return [{head: rounded(x) for head, x in row} for row in named]


def _winner(
    evaluate: Evaluate,
    chosen: tuple[Head, ...],
    rankings: Sequence[dict[Head, float]],
    top_k: int,
    pictures: int,
) -> dict[Head, float]:
    """Return the ranking whose top k, as a set, draw the best pictures."""
    sets = [tuple(sorted(best(one, top_k))) for one in rankings]
    if not pictures or len(set(sets)) == 1:
        return rankings[0]
    scores = evaluate([(*chosen, *heads) for heads in sets], range(pictures)).mean(1)
    order = sorted(range(len(sets)), key=lambda i: (-rounded(float(scores[i])), i))
    return rankings[order[0]]
