"""The mean attention maps of words, summed up over heads, layers and steps while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from attnctl.errors import HostError

__all__ = ["Key", "Positions", "TokenMaps", "common"]

Positions = tuple[tuple[int, ...], ...]
"""Token positions by word."""


@dataclass(frozen=True)
class Key:
    """What is kept apart: the grid of the map, and with `each_head` the site too.

    Args:
        grid: (frames, height, width).
        site: name of the site; "" for the mean over sites and heads.
        heads: indices of the heads in the map; () for their mean.
    """

    grid: tuple[int, int, int]
    site: str = ""
    heads: tuple[int, ...] = ()


@dataclass(eq=False)
class TokenMaps:
    """Sums of one run of one denoiser.

    Args:
        words: names of the words.
        positions: token positions by prompt and word.
        each_head: keep every head of every site apart.
        sums: [samples, heads or parts, words, tokens] by key, float32: with `each_head` every
            head's own, else parts of which the sum is meant.
        tallies: maps summed, for each sample by key.
    """

    words: tuple[str, ...]
    positions: tuple[Positions, ...]
    each_head: bool = False
    sums: dict[Key, Tensor] = field(default_factory=dict)
    tallies: dict[Key, list[int]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[Key, Tensor]:
        """Maps summed, float32 [samples] by key."""
        return {
            key: torch.tensor(tally, dtype=torch.float32) for key, tally in self.tallies.items()
        }

    def of(self, sample: int, samples: int) -> Positions:
        """Return the positions of a sample's words; samples of one prompt follow each other."""
        return self.positions[sample * len(self.positions) // samples]

    def begin(self, key: Key, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Return the sums of a key, zeros if there were none.

        Args:
            key: where to.
            shape: samples of the run, and heads or parts.
            device: where new sums are held.
        """
        if key not in self.sums:
            size = (*shape, len(self.words), math.prod(key.grid))
            self.sums[key] = torch.zeros(size, device=device)
            self.tallies[key] = [0] * shape[0]
        return self.sums[key]

    def add(self, key: Key, samples: int, first: int, mass: Tensor, maps: int) -> None:
        """Add maps of the samples from `first` on.

        Args:
            key: where to.
            samples: samples of the run.
            first: the first sample of these.
            mass: [b, heads or 1, words, tokens], summed over `maps` maps.
            maps: how many maps each of them is the sum of.
        """
        sums = self.begin(key, (samples, mass.shape[1]), mass.device)
        sums[first : first + len(mass), : mass.shape[1]].add_(mass.to(sums.device))
        for sample in range(first, first + len(mass)):
            self.tallies[key][sample] += maps

    def means(self) -> dict[Key, Tensor]:
        """Return the mean maps [samples, heads or 1, words, frames, height, width]."""
        return {key: self._mean(key).unflatten(-1, key.grid) for key in self.sums}

    def _mean(self, key: Key) -> Tensor:
        total = self.sums[key]
        if not self.each_head:
            total = total.sum(1, keepdim=True)
        count = self.counts[key].clamp_min(1).view(-1, 1, 1, 1)
        return total / count.to(total.device)


def common(runs: Sequence[TokenMaps], size: tuple[int, int] | None = None) -> Tensor:
    """Return the mean over all that was summed up, on one grid.

    Args:
        runs: the maps, of one denoiser or of two that share the steps.
        size: (height, width) of the result; None for the largest grid there is.

    Returns:
        [samples, words, frames, height, width] in float32 on the CPU: every map's mean is
        resized bilinearly and weighs as much as the number of maps in it.

    Raises:
        HostError: if nothing was summed up.
    """
    parts = [(key, run, mean) for run in runs for key, mean in run.means().items()]
    if not parts:
        raise HostError("no attention map was seen: no selected site ran at a selected step")
    size = size or max(key.grid[1:] for key, _, _ in parts)
    total = weight = torch.zeros(())
    for key, run, mean in parts:
        # heads kept apart are so many maps as well
        each = run.counts[key].view(-1, 1, 1, 1, 1) * mean.shape[1]
        total = total + each * _resized(mean.float().mean(1).cpu(), size)
        weight = weight + each
    return total / weight.clamp_min(1)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the last two of five dimensions."""
    if maps.shape[-2:] == size:
        return maps
    flat = interpolate(maps.flatten(0, 2)[:, None], size, mode="bilinear", antialias=True)
    return flat[:, 0].unflatten(0, maps.shape[:3])
