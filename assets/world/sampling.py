"""Seeded sampling of scenes, on any device, with the held-out split respected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from attnctl.assets.world.heldout import shows_heldout
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.scenes import Scenes

Split = Literal["train", "heldout", "any"]
RADIUS = (0.14, 0.2)
BACKGROUND = (0.2, 0.8)
TRIES = 64


def sample(
    n: int,
    *,
    objects: int | Sequence[float] = (1, 2, 2),
    split: Split = "any",
    seed: int | torch.Generator = 0,
    radius: tuple[float, float] = RADIUS,
) -> Scenes:
    """Random scenes without repeated pairs and without much overlap.

    Args:
        n: how many.
        objects: a fixed number of objects, or the weights of 1, 2, 3, ... objects.
        split: "train" shows no held-out combination, "heldout" at least one, "any" both.
        seed: a number (then the scenes are on the CPU) or a generator (then on its device).
        radius: least and greatest radius, as a fraction of the picture's side.

    Raises:
        ValueError: a held-out scene of one object was asked for: there is none.
    """
    weights = [0.0] * (objects - 1) + [1.0] if isinstance(objects, int) else list(objects)
    if split == "heldout" and weights[0] > 0:
        raise ValueError("held-out scenes need two objects or more; every single one is trained")
    source = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    pair = sample_pairs(n, weights, split, source)
    size = uniform(pair.shape, radius, source)
    return Scenes(pair, place(pair >= 0, size, source), size, uniform((n,), BACKGROUND, source))


def uniform(
    shape: Sequence[int], limits: tuple[float, float], source: torch.Generator
) -> torch.Tensor:
    """Uniform numbers between two limits on the generator's device."""
    low, high = limits
    return torch.rand(*shape, generator=source, device=source.device) * (high - low) + low


def sample_pairs(
    n: int, weights: Sequence[float], split: Split, source: torch.Generator
) -> torch.Tensor:
    """``[n, len(weights)]`` different pair indices per row, -1 past the row's object count."""
    chance = torch.tensor(weights, device=source.device, dtype=torch.float32)
    count = torch.multinomial(chance, n, replacement=True, generator=source) + 1
    pair = _distinct(count, len(weights), source)
    wrong = _wrong(pair, split)
    while bool(wrong.any()):
        pair[wrong] = _distinct(count[wrong], len(weights), source)
        wrong = _wrong(pair, split)
    return pair


def _distinct(count: torch.Tensor, most: int, source: torch.Generator) -> torch.Tensor:
    noise = torch.rand(len(count), len(PAIRS), generator=source, device=source.device)
    index = noise.topk(most, dim=1).indices
    return index.masked_fill(torch.arange(most, device=source.device) >= count[:, None], -1)


def _wrong(pair: torch.Tensor, split: Split) -> torch.Tensor:
    if split == "any":
        return torch.zeros(len(pair), dtype=torch.bool, device=pair.device)
    return shows_heldout(pair) == (split == "train")


def place(
    there: torch.Tensor, radius: torch.Tensor, source: torch.Generator, margin: float = 0.02
) -> torch.Tensor:
    """Centres ``[B, K, 2]``: of `TRIES` random placements, the first without overlap.

    Where every placement overlaps, the one with the widest smallest gap is taken.
    """
    batch, most = radius.shape
    edge = (radius + margin)[:, None, :, None]
    free = uniform((batch, TRIES, most, 2), (0.0, 1.0), source)
    centre = edge + free * (1 - 2 * edge)
    gap = smallest_gap(centre, there, radius)
    first = torch.where(gap > margin, 2.0, gap).argmax(1)
    return centre[torch.arange(batch, device=radius.device), first]


def smallest_gap(centre: torch.Tensor, there: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """``[B, TRIES]`` least distance between two objects' rims; 1 for fewer than two objects."""
    apart = (centre[:, :, :, None] - centre[:, :, None]).norm(dim=-1)
    apart = apart - (radius[:, :, None] + radius[:, None, :])[:, None]
    same = torch.eye(radius.shape[1], dtype=torch.bool, device=radius.device)
    idle = same | ~(there[:, :, None] & there[:, None, :])
    return apart.masked_fill(idle[:, None], 1.0).flatten(2).amin(-1)
