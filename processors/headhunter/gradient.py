"""Ranking all heads by a few backward passes, then letting pictures decide.

The output of a perturbed head is linear in u, so the slope of the objective with respect to
every head's u comes from one backward of the guided one-step prediction (see `slopes`). What
such a prediction shows depends on the step: colours and layout early, shapes late. So slopes
are taken in several windows of the run, the k steepest heads of each window make a set, and
the sets are compared by real pictures. A set of heads moves the objective far more than a
single head does, so few pictures are enough; scoring heads one by one on as many pictures is
mostly noise. Where the budget allows it, the steepest heads are scored one by one as well.

This is ours, not the paper's: it stands for its search at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .headset import Head, Round
from .rank import Evaluate, Report, best, means, rounded

__all__ = ["Checks", "Slopes", "gradient"]

Slopes = Callable[[tuple[Head, ...]], Tensor]
"""`slopes(heads) -> [W, P]`: mean slope of each head in each window."""


@dataclass(frozen=True)
class Checks:
    """How many real pictures are drawn in each round.

    Args:
        sets: pictures for each set that is compared; 0 trusts all windows' mean alone.
        heads: steepest heads that are also scored one by one; 0 for none.
        pictures: pictures for each of these.
    """

    sets: int = 0
    heads: int = 0
    pictures: int = 0


def gradient(
    evaluate: Evaluate,
    slopes: Slopes,
    pool: Sequence[Head],
    rounds: int,
    top_k: int,
    report: Report,
    *,
    every: Sequence[Head],
    checks: Checks,
) -> list[Round]:
    """Search by slopes.

    Args:
        evaluate: scores candidates.
        slopes: slopes of all heads of the model on top of a head set.
        pool: the heads that may be chosen.
        rounds: R.
        top_k: k.
        report: called after every round.
        every: the heads in the order of the slopes' columns.
        checks: what is checked by real pictures.
    """
    found: list[Round] = []
    chosen: tuple[Head, ...] = ()
    for _ in range(rounds):
        left = {head for head in pool if head not in chosen}
        rankings = _rankings(slopes(chosen), every, left)
        if checks.heads > top_k:
            rankings.append(_scored(evaluate, chosen, rankings[0], checks))
        scores = _winner(evaluate, chosen, rankings, top_k, checks.sets)
        found.append(Round(best(scores, top_k), scores))
        chosen += found[-1].chosen
        report(found[-1])
    return found


def _rankings(slopes: Tensor, every: Sequence[Head], left: set[Head]) -> list[dict[Head, float]]:
    """Return one ranking for all windows together, then one for each.

    Windows are brought to one size first: late slopes are smaller, not less telling.
    """
    size = slopes.abs().mean(1, keepdim=True).clamp(min=1e-30)
    rows = [(slopes / size).mean(0), *(slopes if len(slopes) > 1 else [])]
    named = (zip(every, row.tolist(), strict=True) for row in rows)
    return [{h: rounded(x) for h, x in row if h in left} for row in named]


def _scored(
    evaluate: Evaluate, chosen: tuple[Head, ...], ranking: Mapping[Head, float], checks: Checks
) -> dict[Head, float]:
    steepest = sorted(best(ranking, checks.heads))
    candidates = [(*chosen, head) for head in steepest]
    return means(steepest, evaluate(candidates, range(checks.pictures)))


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
