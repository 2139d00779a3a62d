"""Means and paired differences with bootstrap intervals, and McNemar's exact test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Interval",
    "mcnemar",
    "mean_interval",
    "median_interval",
    "paired_interval",
    "ratio_interval",
]

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of values [n] and the percentile bootstrap interval of it."""
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    low, high = np.quantile(x[picks].mean(axis=1), (0.025, 0.975))
    return Interval(float(x.mean()), float(low), float(high))


def median_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the median of values [n] and the percentile bootstrap interval of it."""
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    low, high = np.quantile(np.median(x[picks], axis=1), (0.025, 0.975))
    return Interval(float(np.median(x)), float(low), float(high))


def paired_interval(treated: np.ndarray, stock: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of treated - stock over cases [n], resampling cases."""
    return mean_interval(np.asarray(treated, float) - np.asarray(stock, float), seed)


def ratio_interval(part: np.ndarray, whole: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of part over that of whole, both over the same cases [n], resampling cases.

    Where the mean of whole may be zero, so that the ratio has no bounds, the interval is wide.
    """
    x, y = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    low, high = np.quantile(x[picks].mean(axis=1) / y[picks].mean(axis=1), (0.025, 0.975))
    return Interval(float(x.mean() / y.mean()), float(low), float(high))


def mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided exact p of McNemar's test.

    The probability of a split at least as uneven as this one if each of the pairs that differ
    were as likely a win as a loss. 1 if none differs.

    Args:
        wins: pairs in which only the treated case is a hit.
        losses: pairs in which only the other one is.
    """
    n, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)
