"""Means and paired differences with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "mean_interval", "paired_interval"]

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


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of values [n] and the percentile bootstrap interval of it."""
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    low, high = np.quantile(x[picks].mean(axis=1), (0.025, 0.975))
    return Interval(float(x.mean()), float(low), float(high))


def paired_interval(treated: np.ndarray, stock: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of treated - stock over cases [n], resampling cases."""
    return mean_interval(np.asarray(treated, float) - np.asarray(stock, float), seed)
