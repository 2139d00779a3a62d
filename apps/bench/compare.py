"""Arms set against each other: paired gains, wins and losses, and what may be said of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .statistics import Interval, mcnemar, mean_interval, paired_interval
from .tasks import Task
from .trials import Outcome

__all__ = ["Pair", "compare", "mean", "paired", "sentences"]


@dataclass(frozen=True)
class Pair:
    """One arm against another, case by case.

    Args:
        arm: name of the first.
        base: name of the second.
        gains: mean of first minus second, by figure.
        wins: cases where only the first is a hit.
        losses: cases where only the second is.
        p: two-sided exact p of McNemar's test.
    """

    arm: str
    base: str
    gains: dict[str, Interval]
    wins: tuple[int, ...]
    losses: tuple[int, ...]
    p: float

    def data(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "arm": self.arm,
            "base": self.base,
            "gains": {key: asdict(gain) for key, gain in self.gains.items()},
            "wins": len(self.wins),
            "losses": len(self.losses),
            "p": self.p,
        }


def mean(values: np.ndarray, repeats: int = 1) -> Interval:
    """Return the mean over cases [n]; prompts, not their repeats, are resampled."""
    return mean_interval(_by_prompt(values, repeats))


def paired(arm: np.ndarray, base: np.ndarray, repeats: int = 1) -> Interval:
    """Return the mean difference over cases [n]; prompts are resampled."""
    return paired_interval(_by_prompt(arm, repeats), _by_prompt(base, repeats))


def _by_prompt(values: np.ndarray, repeats: int) -> np.ndarray:
    """Return the mean of each prompt's cases: prompts are gone through `repeats` times."""
    return np.asarray(values, float).reshape(repeats, -1).mean(0)


def compare(arm: Outcome, base: Outcome, metric: str, repeats: int = 1) -> Pair:
    """Set one arm against another.

    Args:
        arm: the first.
        base: the second.
        metric: key of the figure that is 0 or 1.
        repeats: cases per prompt.
    """
    gains = {key: paired(arm.scores[key], base.scores[key], repeats) for key in base.scores}
    mine, other = arm.scores[metric] > 0.5, base.scores[metric] > 0.5
    wins, losses = (tuple(np.flatnonzero(x).tolist()) for x in (mine & ~other, other & ~mine))
    p = mcnemar(len(wins), len(losses))
    return Pair(arm.trial.name, base.trial.name, gains, wins, losses, p)


def sentences(task: Task, outcomes: Sequence[Outcome], pairs: Sequence[Pair]) -> list[str]:
    """Return what the bench says of the control, no more than the intervals do.

    Args:
        task: the task.
        outcomes: the arms.
        pairs: every comparison, as `compare` gives it.
    """
    return list(_sentences(task, outcomes, pairs))


def _sentences(task: Task, outcomes: Sequence[Outcome], pairs: Sequence[Pair]) -> Iterator[str]:
    metric = task.figures[0].key
    by_name = {(p.arm, p.base): p for p in pairs}
    (control,) = (o.trial.name for o in outcomes if o.trial.role == "control")
    n, main = len(task.prompts), by_name[control, "stock"]
    for outcome in outcomes:
        if outcome.trial.role in ("control", "against"):
            yield _over_stock(by_name[outcome.trial.name, "stock"], metric, task.unit, n)
    for outcome in outcomes:
        name = outcome.trial.name
        if outcome.trial.role == "against":
            yield _over_rival(by_name[control, name], metric)
        elif outcome.trial.role == "placebo":
            yield _over_placebo(by_name[control, name], main, metric)


def _over_stock(pair: Pair, metric: str, unit: str, n: int) -> str:
    gain = pair.gains[metric]
    if not pair.wins and not pair.losses:
        return f"{pair.arm}: no case out of {n} came out otherwise than in stock."
    if gain.above_zero:
        return f"{pair.arm} gives more {unit} than stock: {points(gain)} points."
    if gain.below_zero:
        return f"{pair.arm} gives fewer {unit} than stock: {points(gain)} points."
    return (
        f"{pair.arm}: no effect on {unit} is shown; the interval of the gain over stock, "
        f"{points(gain)} points, contains 0."
    )


def _over_rival(pair: Pair, metric: str) -> str:
    gain = pair.gains[metric]
    if gain.above_zero or gain.below_zero:
        word = "better" if gain.above_zero else "worse"
        return f"{pair.arm} does {word} than {pair.base}: {points(gain)} points."
    return (
        f"Which of {pair.arm} and {pair.base} does better is not shown: the difference, "
        f"{points(gain)} points, contains 0."
    )


def _over_placebo(pair: Pair, main: Pair, metric: str) -> str:
    gain, name = pair.gains[metric], pair.base.removeprefix("placebo: ")
    if gain.above_zero:
        return f"{pair.arm} does better than the placebo ({name}): {points(gain)} points."
    if gain.below_zero:
        text = (
            f"The placebo ({name}) does better: {pair.arm} minus placebo is {points(gain)} points"
        )
    else:
        text = (
            f"The placebo ({name}) does as well, as far as is shown: {pair.arm} minus placebo, "
            f"{points(gain)} points, contains 0"
        )
    if main.gains[metric].above_zero:
        return f"{text}. So the gain over stock need not come from where the control points."
    return f"{text}."


def points(gain: Interval) -> str:
    """Return a difference of shares in points."""
    shown = (round(100 * x, 1) + 0.0 for x in (gain.value, gain.low, gain.high))
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*shown)
