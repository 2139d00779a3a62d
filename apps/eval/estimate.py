"""Figures that are functions of summed counts, with intervals from resampling the images.

A scorer turns answers into counts per case. A figure is computed from their sums, so that a
ratio such as F1 or CHAIR_i, which is no mean over cases, gets its interval in the same way as
an accuracy. All cases of an image are drawn together; they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attnctl.apps.bench.statistics import Interval

from .bad_data import EvalError

__all__ = ["Figure", "Sums", "Tally", "difference", "estimate", "ratio"]

Sums = Mapping[str, np.ndarray]
RESAMPLES = 4000
_AT_ONCE = 500


@dataclass(frozen=True)
class Figure:
    """A number of the result.

    Attributes:
        key: its name in files.
        head: its name in tables.
        of: sums of counts [R] to values [R].
        unit: "%" for shares, printed times 100.
        digits: decimals in tables.
    """

    key: str
    head: str
    of: Callable[[Sums], np.ndarray]
    unit: str = "%"
    digits: int = 1

    @property
    def factor(self) -> float:
        """What values are multiplied by in tables."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Tally:
    """Counts of answers.

    Attributes:
        images: the image of each case, [n].
        counts: by name, [n].
        figures: what is computed from their sums.
    """

    images: Sequence[str]
    counts: Mapping[str, np.ndarray]
    figures: Sequence[Figure]

    @classmethod
    def of(
        cls, images: Sequence[str], rows: Sequence[Mapping[str, float]], figures: Sequence[Figure]
    ) -> Tally:
        """Return a tally from the counts of each case; what a case does not name is 0."""
        names = sorted({name for row in rows for name in row})
        counts = {name: np.array([row.get(name, 0) for row in rows], float) for name in names}
        return cls(list(images), counts, figures)

    def by_image(self) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return the images and the sums of their cases."""
        names = list(dict.fromkeys(self.images))
        place = {name: i for i, name in enumerate(names)}
        index = np.array([place[image] for image in self.images], int)
        sums = {
            key: np.bincount(index, weights=values, minlength=len(names))
            for key, values in self.counts.items()
        }
        return names, sums


class _Sums(dict[str, np.ndarray]):
    """Sums by name; a count that no case has is 0."""

    def __missing__(self, key: str) -> np.ndarray:
        return np.zeros_like(next(iter(self.values())))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, 0 where there is nothing to take a part of."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole != 0)


def estimate(tally: Tally, seed: int = 0) -> dict[str, Interval]:
    """Return every figure with its 95 % interval, by key."""
    names, sums = tally.by_image()
    drawn = _resampled(sums, len(names), seed)
    whole = _whole(sums)
    return {f.key: _interval(float(f.of(whole)[0]), f.of(drawn)) for f in tally.figures}


def difference(tally: Tally, base: Tally, seed: int = 0) -> dict[str, Interval]:
    """Return every figure minus that of the baseline, with the 95 % interval, by key.

    Both are resampled with the same images each time.

    Raises:
        EvalError: if the two are not about the same images.
    """
    names, sums = tally.by_image()
    others, base_sums = base.by_image()
    if sorted(names) != sorted(others) or len(tally.images) != len(base.images):
        raise EvalError("a paired difference needs answers to the same items on both sides")
    order = [others.index(name) for name in names] if names != others else slice(None)
    base_sums = {key: values[order] for key, values in base_sums.items()}
    drawn, base_drawn = (_resampled(one, len(names), seed) for one in (sums, base_sums))
    whole, base_whole = _whole(sums), _whole(base_sums)
    return {
        f.key: _interval(
            float(f.of(whole)[0] - f.of(base_whole)[0]), f.of(drawn) - f.of(base_drawn)
        )
        for f in tally.figures
    }


def _whole(sums: Sums) -> Sums:
    return _Sums({key: values.sum(keepdims=True) for key, values in sums.items()})


def _resampled(sums: Sums, n: int, seed: int) -> Sums:
    """Return the sums over `n` images drawn with replacement, [RESAMPLES]; same draws per seed."""
    source = np.random.default_rng(seed)
    stacked = np.stack(list(sums.values()), axis=1)
    parts = []
    for start in range(0, RESAMPLES, _AT_ONCE):
        times = source.multinomial(n, np.full(n, 1 / n), min(_AT_ONCE, RESAMPLES - start))
        parts.append(times @ stacked)
    drawn = np.concatenate(parts)
    return _Sums({key: drawn[:, i] for i, key in enumerate(sums)})


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(value, float(low), float(high))
