"""What a run with sparse attention computed, told after it: by layer and step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from .radial_plan import speedup

__all__ = ["SparseAccount"]

V = TypeVar("V")


@dataclass(frozen=True)
class SparseAccount:
    """What a run computed of its self-attention; prints as a table of equal steps and layers.

    Args:
        computed: float64 [steps, layers], part of the blocks: the density of the mask, 1 where
            dense, 1 more than the density where some heads stay dense (that computes both).
        steps: number of each step, of those at which this denoiser ran.
        layers: number of each layer.
        attention_share: part of a dense step's time in self-attention, estimated by
            operations.
    """

    computed: Tensor
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    attention_share: float

    @property
    def density(self) -> float:
        """Part of all blocks that was computed, over all layers and steps."""
        return float(self.computed.mean())

    @property
    def speedup(self) -> float:
        """Expected speedup of the denoiser, if a block costs as much as in dense attention.

        An upper bound: measured kernels reach less.
        """
        return speedup(self.attention_share, 0.0, self.density)

    def __str__(self) -> str:
        head = (
            f"computed {self.density:.1%} of the blocks of self-attention, speedup at most "
            f"{self.speedup:.2f} with {self.attention_share:.0%} of a dense step in it"
        )
        rows = zip(self.steps, self.computed.tolist(), strict=True)
        return "\n".join([head, *(self._text(row, n) for row, n in _runs(rows))])

    def _text(self, row: list[float], steps: list[int]) -> str:
        parts = [
            f"{_range('layer', layers)} {part:.1%}"
            for part, layers in _runs(zip(self.layers, row, strict=True))
        ]
        return f"{_range('step', steps)}: {', '.join(parts)}"


def _runs(pairs: Iterable[tuple[int, V]]) -> list[tuple[V, list[int]]]:
    """Join neighbours of equal value: (number, value) -> (value, numbers)."""
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [(value, [number for number, _ in group]) for value, group in groups]


def _range(word: str, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    return f"{word}s {numbers[0]}-{numbers[-1]}"
